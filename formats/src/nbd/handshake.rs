//! The server's side of the fixed newstyle handshake: bytes in, in pieces of any size; bytes out.
//!
//! ```text
//! greeting ─► client flags ─► option header ─► data ─► reply ─┬─► Transmission
//!                                   ▲  └─► too long: skip     ├─► Closed
//!                                   └─────────────────────────┴─► StartTls: the same, inside TLS
//! ```
//!
//! An option's data is taken whole before it is looked at, and what is wrong with it ends with it:
//! the next option begins where the header said. What a client chose (the style of replies, contexts)
//! is kept here until an export is chosen; contexts belong to the export they were asked for.
//!
//! STARTTLS is a border: nothing that came before it in plain has a meaning behind it, for anybody on
//! the way could have said it. So what was chosen is forgotten, and bytes that came with the request,
//! before its ACK, end the connection. Kept, they would be taken for options that TLS protected.
//!
//! A connection costs `OPTION_LEN_MAX` bytes for the option being collected (allocated as they
//! come), five times as much while its queries are looked at, and the replies to one option, the
//! longest being LIST's: at most 8 KiB and 28 bytes an export.
use super::context::{self, Context};
use super::export::{ExportInfo, Exports};
use super::option::{Bad, ContextRequest, InfoRequest, context_request, export_name, info_request};
use super::reply::Style;
use super::wire::{Fields, NBD_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC};
use super::wire::{handshake_flag, info, opt, rep};

/// Longest data of an option that is looked at, in bytes.
pub const OPTION_LEN_MAX: u32 = 64 << 10;
/// Longest data of an option that is skipped, to refuse it politely; past this the client is dropped.
pub const OPTION_SKIP_MAX: u32 = 1 << 20;
/// Options that one client may send.
pub const OPTIONS_MAX: u32 = 4096;

/// Whether clients go on inside TLS: the protocol's modes NOTLS, SELECTIVETLS and FORCEDTLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tls {
    /// They cannot.
    #[default]
    Off,
    /// Those that ask for it.
    Allowed,
    /// All of them; before, a client may only ask for it or leave.
    Required,
}

/// What client and server agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The disk, as it was described to the client.
    pub export: ExportInfo,
    /// How the client wants its replies, and how long its headers are.
    pub style: Style,
    /// The metadata contexts that the client chose for this disk, with their numbers.
    pub contexts: Vec<(u32, Context)>,
    /// The client asked for the block sizes, so it keeps to them.
    pub block_sizes_told: bool,
}

/// How far a handshake has come.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// More to come: send what there is, then step again with what was not taken, or with more.
    More,
    /// Send what there is in plain. What comes then is TLS; what is inside goes to the next step.
    /// All of the input was taken.
    StartTls,
    /// Done: send what there is; the bytes that were not taken are the first requests.
    Transmission(Box<Negotiated>),
    /// Over: send what there is, then close.
    Closed(Reason),
}

/// Why a handshake ended without an export.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// As it wished.
    #[error("the client left (ABORT)")]
    Aborted,
    /// It wants what was not offered.
    #[error("client flags {0:#x} were not offered")]
    ClientFlags(u32),
    /// These bytes are no option.
    #[error("an option begins with {0:#018x} instead of IHAVEOPT")]
    Magic(u64),
    /// Too long even to be skipped.
    #[error("option {option} has {len} bytes of data, more than {OPTION_SKIP_MAX}")]
    OptionTooLong {
        /// Which.
        option: u32,
        /// What its header says.
        len: u32,
    },
    /// Somebody plays.
    #[error("more than {OPTIONS_MAX} options")]
    TooManyOptions,
    /// A client without FIXED_NEWSTYLE cannot be told of an error.
    #[error("option {0} from a client that does not speak fixed newstyle")]
    NotFixed(u32),
    /// They may be anybody's.
    #[error("bytes in plain behind STARTTLS")]
    BehindStartTls,
    /// EXPORT_NAME has no reply for it.
    #[error("EXPORT_NAME: {0}")]
    ExportName(String),
}

/// One client's handshake.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    /// What came of the unit that `state` waits for.
    collected: Vec<u8>,
    options: u32,
    client_flags: u16,
    tls: Tls,
    /// True from the ACK to STARTTLS on.
    inside_tls: bool,
    style: Style,
    /// The contexts that were chosen, and for which export.
    contexts: Option<(String, Vec<(u32, Context)>)>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    ClientFlags,
    Header,
    Data { option: u32, len: u32 },
    Skip { option: u32, left: u32 },
    Over,
}

const CLIENT_FLAGS_LEN: usize = 4;
const OPTION_HEADER_LEN: usize = 16;
const OFFERED: u16 = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;

impl Handshake {
    /// A handshake with a client that has just come. The greeting is put into `out`.
    pub fn new(tls: Tls, out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(&NBD_MAGIC.to_be_bytes());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&OFFERED.to_be_bytes());
        Self {
            state: State::ClientFlags,
            collected: Vec::new(),
            options: 0,
            client_flags: 0,
            tls,
            inside_tls: false,
            style: Style::Simple,
            contexts: None,
        }
    }

    /// Takes bytes off the front of `input`, answers one option at most, and puts what has to be
    /// sent behind what is in `out`. With `More` all of `input` was taken, or an option was answered.
    pub fn step(&mut self, input: &mut &[u8], exports: &(impl Exports + ?Sized), out: &mut Vec<u8>) -> Outcome {
        loop {
            let Some(unit) = self.unit(input) else { return Outcome::More };
            let (outcome, answered) = match self.state {
                State::ClientFlags => (self.client_flags(&unit), false),
                State::Header => (self.header(&unit), false),
                State::Data { option: opt::STARTTLS, .. } => {
                    self.state = State::Header;
                    (self.start_tls(&unit, input, out), true)
                }
                State::Data { option, .. } => {
                    self.state = State::Header;
                    (self.option(option, &unit, exports, out), true)
                }
                State::Skip { option, .. } => {
                    self.state = State::Header;
                    let refused = match self.lacks_tls(option) {
                        true => Refused::TlsRequired,
                        false => Bad::TooBig("the option's data is too long").into(),
                    };
                    refuse(out, option, refused);
                    (Outcome::More, true)
                }
                State::Over => unreachable!("an ended handshake has no units"),
            };
            if !matches!(outcome, Outcome::More | Outcome::StartTls) {
                self.state = State::Over;
            }
            if answered || outcome != Outcome::More {
                return outcome;
            }
        }
    }

    /// What the state waits for, when it is all there. Of what is skipped, nothing is kept.
    fn unit(&mut self, input: &mut &[u8]) -> Option<Vec<u8>> {
        let len = match &mut self.state {
            State::ClientFlags => CLIENT_FLAGS_LEN,
            State::Header => OPTION_HEADER_LEN,
            State::Data { len, .. } => *len as usize,
            State::Skip { left, .. } => {
                let len = input.len().min(*left as usize);
                *input = &input[len..];
                *left -= len as u32;
                return (*left == 0).then(Vec::new);
            }
            State::Over => panic!("the handshake is over"),
        };
        let (head, rest) = input.split_at(input.len().min(len - self.collected.len()));
        self.collected.extend_from_slice(head);
        *input = rest;
        (self.collected.len() == len).then(|| std::mem::take(&mut self.collected))
    }

    fn client_flags(&mut self, unit: &[u8]) -> Outcome {
        let flags = Fields(unit).u32().expect("a unit has its length");
        if flags & !u32::from(OFFERED) != 0 {
            return Outcome::Closed(Reason::ClientFlags(flags));
        }
        self.client_flags = flags as u16;
        self.state = State::Header;
        Outcome::More
    }

    fn header(&mut self, unit: &[u8]) -> Outcome {
        let mut fields = Fields(unit);
        let (Some(magic), Some(option), Some(len)) = (fields.u64(), fields.u32(), fields.u32()) else {
            unreachable!("a unit has its length");
        };
        self.options += 1;
        let reason = if magic != OPTION_MAGIC {
            Reason::Magic(magic)
        } else if self.options > OPTIONS_MAX {
            Reason::TooManyOptions
        } else if self.client_flags & handshake_flag::FIXED_NEWSTYLE == 0 && option != opt::EXPORT_NAME {
            Reason::NotFixed(option)
        } else if len > OPTION_SKIP_MAX {
            Reason::OptionTooLong { option, len }
        } else if len > OPTION_LEN_MAX && option == opt::EXPORT_NAME {
            Reason::ExportName(format!("a name of {len} bytes"))
        } else {
            if option == opt::SET_META_CONTEXT {
                // Whatever comes of it, what was chosen before is gone.
                self.contexts = None;
            }
            self.state = match len > OPTION_LEN_MAX {
                true => State::Skip { option, left: len },
                false => State::Data { option, len },
            };
            return Outcome::More;
        };
        Outcome::Closed(reason)
    }

    /// True where `option` has to wait for TLS.
    fn lacks_tls(&self, option: u32) -> bool {
        self.tls == Tls::Required && !self.inside_tls && !matches!(option, opt::ABORT | opt::STARTTLS)
    }

    fn start_tls(&mut self, data: &[u8], behind: &[u8], out: &mut Vec<u8>) -> Outcome {
        let refused = match nothing_in(data) {
            _ if self.tls == Tls::Off => Refused::NoTls,
            _ if self.inside_tls => Bad::Invalid("this connection is inside TLS already").into(),
            Err(refused) => refused,
            Ok(()) if !behind.is_empty() => return Outcome::Closed(Reason::BehindStartTls),
            Ok(()) => {
                self.inside_tls = true;
                (self.style, self.contexts) = (Style::Simple, None);
                reply(out, opt::STARTTLS, rep::ACK, &[]);
                return Outcome::StartTls;
            }
        };
        refuse(out, opt::STARTTLS, refused);
        Outcome::More
    }

    fn option(&mut self, option: u32, data: &[u8], exports: &(impl Exports + ?Sized), out: &mut Vec<u8>) -> Outcome {
        let done = match option {
            opt::EXPORT_NAME if self.lacks_tls(option) => {
                return Outcome::Closed(Reason::ExportName("this server requires TLS".into()));
            }
            _ if self.lacks_tls(option) => Err(Refused::TlsRequired),
            opt::EXPORT_NAME => return self.export_name(data, exports, out),
            opt::GO => match self.info(option, data, exports, out) {
                Ok(negotiated) => {
                    reply(out, option, rep::ACK, &[]);
                    return Outcome::Transmission(Box::new(negotiated));
                }
                Err(bad) => Err(bad),
            },
            opt::INFO => self.info(option, data, exports, out).map(drop),
            // Data is to be ignored here.
            opt::ABORT => {
                reply(out, option, rep::ACK, &[]);
                return Outcome::Closed(Reason::Aborted);
            }
            opt::LIST => nothing_in(data).map(|()| list(exports, out)),
            opt::STRUCTURED_REPLY => self.choose(Style::Structured, data),
            opt::EXTENDED_HEADERS => self.choose(Style::Extended, data),
            opt::LIST_META_CONTEXT => list_contexts(data, exports, out),
            opt::SET_META_CONTEXT => self.set_contexts(data, exports, out),
            _ => Err(Refused::Unsupported),
        };
        match done {
            Ok(()) => reply(out, option, rep::ACK, &[]),
            Err(refused) => refuse(out, option, refused),
        }
        Outcome::More
    }

    fn export_name(&mut self, data: &[u8], exports: &(impl Exports + ?Sized), out: &mut Vec<u8>) -> Outcome {
        let closed = |why: String| Outcome::Closed(Reason::ExportName(why));
        let Ok(name) = export_name(data) else {
            return closed("a name that is too long or no UTF-8".into());
        };
        let Some(export) = exports.lookup(name) else {
            return closed(format!("there is no export {name:?}"));
        };
        if export.block_sizes.minimum > 1 {
            return closed(format!("{name:?} has to be asked for its block sizes, with GO"));
        }
        out.extend_from_slice(&export.size.to_be_bytes());
        let negotiated = self.negotiated(export, false);
        out.extend_from_slice(&negotiated.transmission_flags().to_be_bytes());
        if self.client_flags & handshake_flag::NO_ZEROES == 0 {
            out.extend_from_slice(&[0; 124]);
        }
        Outcome::Transmission(Box::new(negotiated))
    }

    /// INFO and GO: the facts, all but the ACK.
    fn info(
        &self,
        option: u32,
        data: &[u8],
        exports: &(impl Exports + ?Sized),
        out: &mut Vec<u8>,
    ) -> Result<Negotiated, Refused> {
        let request = info_request(data)?;
        let export = exports.lookup(request.name).ok_or(Refused::Unknown)?;
        let needs_block_size = export.block_sizes.minimum > 1;
        if needs_block_size && !request.block_size {
            block_size(out, option, &export);
            return Err(Refused::BlockSizeRequired);
        }
        let negotiated = self.negotiated(export, request.block_size);
        facts(out, option, &request, &negotiated);
        Ok(negotiated)
    }

    /// Once with 64-bit headers, always: which style a reply has must not depend on when it was asked for.
    fn choose(&mut self, style: Style, data: &[u8]) -> Result<(), Refused> {
        nothing_in(data)?;
        match (self.style, style) {
            (Style::Extended, Style::Structured) => return Err(Refused::ExtendedHeadersRequired),
            _ => self.style = style,
        }
        Ok(())
    }

    fn set_contexts(
        &mut self,
        data: &[u8],
        exports: &(impl Exports + ?Sized),
        out: &mut Vec<u8>,
    ) -> Result<(), Refused> {
        if self.style == Style::Simple {
            return Err(Bad::Invalid("structured replies or extended headers come first").into());
        }
        let request = context_request(data)?;
        let export = exports.lookup(request.name).ok_or(Refused::Unknown)?;
        let chosen = context::chosen(&export, &request.queries);
        for (number, context) in &chosen {
            tell_context(out, opt::SET_META_CONTEXT, *number, context);
        }
        self.contexts = Some((export.name, chosen));
        Ok(())
    }

    fn negotiated(&self, export: ExportInfo, block_sizes_told: bool) -> Negotiated {
        let chosen = self.contexts.as_ref().filter(|(name, _)| *name == export.name);
        let contexts = chosen.map_or_else(Vec::new, |(_, contexts)| contexts.clone());
        Negotiated { style: self.style, contexts, block_sizes_told, export }
    }
}

impl Negotiated {
    /// What the client is told that it may ask for.
    pub fn transmission_flags(&self) -> u16 {
        self.export.transmission_flags(self.style, !self.contexts.is_empty())
    }
}

/// Why an option gets an error for a reply.
enum Refused {
    Bad(Bad),
    Unsupported,
    Unknown,
    BlockSizeRequired,
    ExtendedHeadersRequired,
    TlsRequired,
    NoTls,
}

impl From<Bad> for Refused {
    fn from(bad: Bad) -> Self {
        Self::Bad(bad)
    }
}

fn refuse(out: &mut Vec<u8>, option: u32, refused: impl Into<Refused>) {
    let (kind, message) = match refused.into() {
        Refused::Bad(Bad::Invalid(why)) => (rep::ERR_INVALID, why),
        Refused::Bad(Bad::TooBig(why)) => (rep::ERR_TOO_BIG, why),
        Refused::Unsupported => (rep::ERR_UNSUP, "this option is not supported"),
        Refused::Unknown => (rep::ERR_UNKNOWN, "there is no export of this name"),
        Refused::BlockSizeRequired => (rep::ERR_BLOCK_SIZE_REQD, "this export's block sizes have to be asked for"),
        Refused::ExtendedHeadersRequired => (rep::ERR_EXT_HEADER_REQD, "extended headers were chosen before"),
        Refused::TlsRequired => (rep::ERR_TLS_REQD, "this server requires TLS: connect with certificates (nbds://)"),
        Refused::NoTls => (rep::ERR_POLICY, "this server was started without TLS"),
    };
    reply(out, option, kind, &[message.as_bytes()]);
}

fn nothing_in(data: &[u8]) -> Result<(), Refused> {
    match data {
        [] => Ok(()),
        _ => Err(Bad::Invalid("this option has no data").into()),
    }
}

fn list(exports: &(impl Exports + ?Sized), out: &mut Vec<u8>) {
    for ExportInfo { name, description, .. } in exports.list() {
        let len = (name.len() as u32).to_be_bytes();
        reply(out, opt::LIST, rep::SERVER, &[&len, name.as_bytes(), description.as_bytes()]);
    }
}

/// Structured replies are not asked for first: a client may look without them.
fn list_contexts(data: &[u8], exports: &(impl Exports + ?Sized), out: &mut Vec<u8>) -> Result<(), Refused> {
    let ContextRequest { name, queries } = context_request(data)?;
    let export = exports.lookup(name).ok_or(Refused::Unknown)?;
    for (_, context) in context::listed(&export, &queries) {
        // The number is reserved in this reply.
        tell_context(out, opt::LIST_META_CONTEXT, 0, &context);
    }
    Ok(())
}

fn tell_context(out: &mut Vec<u8>, option: u32, number: u32, context: &Context) {
    reply(out, option, rep::META_CONTEXT, &[&number.to_be_bytes(), context.name().as_bytes()]);
}

fn facts(out: &mut Vec<u8>, option: u32, request: &InfoRequest, negotiated: &Negotiated) {
    let (export, flags) = (&negotiated.export, negotiated.transmission_flags().to_be_bytes());
    fact(out, option, info::EXPORT, &[&export.size.to_be_bytes(), &flags]);
    if request.canonical_name {
        fact(out, option, info::NAME, &[export.name.as_bytes()]);
    }
    if request.description && !export.description.is_empty() {
        fact(out, option, info::DESCRIPTION, &[export.description.as_bytes()]);
    }
    if request.block_size {
        block_size(out, option, export);
    }
}

fn block_size(out: &mut Vec<u8>, option: u32, export: &ExportInfo) {
    let sizes = export.block_sizes;
    let [minimum, preferred, maximum] = [sizes.minimum, sizes.preferred, sizes.maximum].map(u32::to_be_bytes);
    fact(out, option, info::BLOCK_SIZE, &[&minimum, &preferred, &maximum]);
}

fn fact(out: &mut Vec<u8>, option: u32, kind: u16, parts: &[&[u8]]) {
    let kind = kind.to_be_bytes();
    let parts: Vec<_> = std::iter::once(&kind[..]).chain(parts.iter().copied()).collect();
    reply(out, option, rep::INFO, &parts);
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    for field in [option, kind, len as u32] {
        out.extend_from_slice(&field.to_be_bytes());
    }
    parts.iter().for_each(|part| out.extend_from_slice(part));
}

#[cfg(test)]
mod tests;
