//! The client's side of the handshake: the newest manner that the server understands.
//!
//! ```text
//! greeting ─► fixed newstyle ─► STRUCTURED_REPLY ─► SET_META_CONTEXT ─► GO ─► Session
//!         │    │    ▲                │ no                ▲      no │    │ unknown
//!         │    ▼    │                └───────────────────┼─────────┘    ▼
//!         │  STARTTLS, where the address says so         │
//!         └─► newstyle without answers ──────────────────┴────────► EXPORT_NAME ─► Session
//! ```
//!
//! STARTTLS is a border. It is the first option, so nothing is agreed on in plain; behind the server's ACK comes TLS and
//! not a byte before it, for whoever is on the way could have put it there; and a server that refuses, or knows no
//! options, is left: an address inside TLS is never spoken to in plain.
//!
//! A connection costs one reply at a time, `REPLY_LEN_MAX` bytes at most.
use super::super::address::Address;
use super::super::context::Context;
use super::super::export::BlockSizes;
use super::super::wire::{Fields, NBD_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, STRING_LEN_MAX};
use super::super::wire::{handshake_flag, info, opt, rep, transmission_flag};
use super::{Collector, Session};
use crate::error::{Error, Result};

/// Longest reply to an option, in bytes: two of the protocol's strings and what is around them.
const REPLY_LEN_MAX: u32 = 2 * STRING_LEN_MAX as u32 + 64;
/// Replies that a server may give to one option.
const REPLIES_MAX: u32 = 256;
/// Second half of the greeting of servers before 2011.
const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;

const GREETING_LEN: usize = 18;
const REPLY_HEADER_LEN: usize = 20;
const EXPORT_NAME_REPLY_LEN: usize = 10;
const ZEROES_LEN: usize = 124;

/// What comes next in a negotiation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Send what there is, and step again with what comes.
    More,
    /// Begin TLS: nothing is left to send in plain. Then `inside_tls`; what is inside goes to the next step.
    StartTls,
    /// Agreed: what was not taken are the first replies.
    Session(Session),
}

/// One negotiation about one export.
#[derive(Debug)]
pub struct Negotiation {
    export: String,
    tls: bool,
    state: State,
    collector: Collector,
    /// Replies that came to the option that is under way.
    replies: u32,
    no_zeroes: bool,
    structured_replies: bool,
    base_allocation: Option<u32>,
    facts: Option<(u64, u16)>,
    block_sizes: BlockSizes,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Greeting,
    /// The head of a reply to this option.
    Header(u32),
    /// What belongs to it.
    Reply {
        option: u32,
        kind: u32,
        len: u32,
    },
    /// What EXPORT_NAME is answered.
    ExportName,
    /// TLS begins here.
    Border,
    Over,
}

impl Negotiation {
    /// A negotiation about what is at `address`, with a server that has just been reached. The server speaks first.
    pub fn new(address: &Address) -> Self {
        Self {
            export: address.export.clone(),
            tls: address.tls.is_some(),
            state: State::Greeting,
            collector: Collector::default(),
            replies: 0,
            no_zeroes: false,
            structured_replies: false,
            base_allocation: None,
            facts: None,
            block_sizes: BlockSizes::default(),
        }
    }

    /// Takes bytes off the front of `input` and puts what has to be sent behind what is in `out`: what was put
    /// there before and has not gone yet. Without a session all of `input` was taken.
    pub fn step(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Result<Next> {
        loop {
            let len = match self.state {
                State::Greeting => GREETING_LEN,
                State::Header(_) => REPLY_HEADER_LEN,
                State::Reply { len, .. } => len as usize,
                State::ExportName => EXPORT_NAME_REPLY_LEN + if self.no_zeroes { 0 } else { ZEROES_LEN },
                State::Border => return border(input, out).map(|()| Next::StartTls),
                State::Over => return Err(Error::invalid("the negotiation is over")),
            };
            let Some(unit) = self.collector.take(input, len) else { return Ok(Next::More) };
            let state = std::mem::replace(&mut self.state, State::Over);
            let mut fields = Fields(&unit);
            let session = match state {
                State::Greeting => self.greeting(&mut fields, out).map(|()| None),
                State::Header(option) => self.header(option, &mut fields).map(|()| None),
                State::Reply { option, kind, .. } => self.reply(option, kind, &unit, out),
                State::ExportName => self.export_facts(&mut fields).and_then(|()| self.session().map(Some)),
                State::Border | State::Over => unreachable!("looked at above"),
            }?;
            if let Some(session) = session {
                return Ok(Next::Session(session));
            }
        }
    }

    /// TLS has begun: what is put into `out`, and all that follows, is inside of it.
    pub fn inside_tls(&mut self, out: &mut Vec<u8>) {
        assert!(matches!(self.state, State::Border), "TLS begins once, where the server said so");
        self.ask(opt::STRUCTURED_REPLY, &[], out);
    }

    /// What a server says by closing the connection now.
    pub fn hung_up(&self) -> Error {
        Error::malformed(match self.state {
            // There is no other way for it to say so.
            State::ExportName => format!("the server hung up on the name: it has no export {:?}", self.export),
            _ => "the server hung up during the negotiation".to_owned(),
        })
    }

    fn greeting(&mut self, fields: &mut Fields<'_>, out: &mut Vec<u8>) -> Result<()> {
        let (magic, style, flags) = (fields.u64(), fields.u64(), fields.u16().unwrap_or_default());
        match (magic, style) {
            (Some(NBD_MAGIC), Some(OPTION_MAGIC)) => {}
            (Some(NBD_MAGIC), Some(OLDSTYLE_MAGIC)) => {
                return Err(Error::unsupported("the server speaks the old protocol without options: use a newer one"));
            }
            _ => return Err(Error::malformed("no NBD server: it does not begin with NBDMAGIC and IHAVEOPT")),
        }
        let ours = flags & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        self.no_zeroes = ours & handshake_flag::NO_ZEROES != 0;
        out.extend_from_slice(&u32::from(ours).to_be_bytes());
        match ours & handshake_flag::FIXED_NEWSTYLE != 0 {
            true if self.tls => self.ask(opt::STARTTLS, &[], out),
            true => self.ask(opt::STRUCTURED_REPLY, &[], out),
            false if self.tls => return Err(no_tls("it knows no options", &[])),
            false => self.ask_by_name(out),
        }
        Ok(())
    }

    fn header(&mut self, asked: u32, fields: &mut Fields<'_>) -> Result<()> {
        let (Some(magic), Some(option), Some(kind), Some(len)) =
            (fields.u64(), fields.u32(), fields.u32(), fields.u32())
        else {
            unreachable!("a unit has its length");
        };
        if magic != OPTION_REPLY_MAGIC {
            return Err(Error::malformed(format!("a reply to option {asked} begins with {magic:#018x}")));
        }
        if option != asked {
            return Err(Error::malformed(format!("a reply to option {option} came where {asked} was asked")));
        }
        if len > REPLY_LEN_MAX {
            return Err(Error::malformed(format!(
                "a reply to option {option} has {len} bytes, more than {REPLY_LEN_MAX}"
            )));
        }
        self.replies += 1;
        if self.replies > REPLIES_MAX {
            return Err(Error::malformed(format!("option {option} has more than {REPLIES_MAX} replies")));
        }
        self.state = State::Reply { option, kind, len };
        Ok(())
    }

    /// One reply to the option that is under way.
    fn reply(&mut self, option: u32, kind: u32, data: &[u8], out: &mut Vec<u8>) -> Result<Option<Session>> {
        let mut fields = Fields(data);
        self.state = State::Header(option);
        match (option, kind) {
            (opt::STARTTLS, rep::ACK) if data.is_empty() => self.state = State::Border,
            (opt::STARTTLS, _) if kind & rep::ERROR != 0 => {
                return Err(no_tls(&format!("error {kind:#x}"), data));
            }
            (_, rep::ERR_TLS_REQD) => {
                return Err(Error::invalid(format!(
                    "the server wants TLS{}: name it by nbds:// or nbds+unix://",
                    said(data)
                )));
            }
            (opt::STRUCTURED_REPLY, rep::ACK) => {
                self.structured_replies = true;
                self.ask_contexts(out);
            }
            // What is refused here is done without.
            (opt::STRUCTURED_REPLY, _) if kind & rep::ERROR != 0 => self.ask_to_go(out),
            (opt::SET_META_CONTEXT, rep::META_CONTEXT) => self.context(&mut fields)?,
            (opt::SET_META_CONTEXT, rep::ACK) => self.ask_to_go(out),
            (opt::SET_META_CONTEXT, _) if kind & rep::ERROR != 0 => {
                self.base_allocation = None;
                self.ask_to_go(out);
            }
            (opt::GO, rep::INFO) => self.info(&mut fields)?,
            (opt::GO, rep::ACK) => return self.session().map(Some),
            (opt::GO, rep::ERR_UNSUP) => {
                // Contexts belong to GO: without it nobody knows whether they hold.
                self.base_allocation = None;
                self.ask_by_name(out);
            }
            (opt::GO, rep::ERR_UNKNOWN) => {
                return Err(Error::invalid(format!("the server has no export {:?}{}", self.export, said(data))));
            }
            (opt::GO, _) if kind & rep::ERROR != 0 => {
                return Err(Error::invalid(format!("the server refuses the export (error {kind:#x}){}", said(data))));
            }
            _ => return Err(Error::malformed(format!("option {option} has a reply of the type {kind}"))),
        }
        Ok(None)
    }

    fn ask(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&option.to_be_bytes());
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
        self.replies = 0;
        self.state = State::Header(option);
    }

    fn ask_contexts(&mut self, out: &mut Vec<u8>) {
        let data = [&string(&self.export)[..], &1u32.to_be_bytes(), &string(&Context::Allocation.name())].concat();
        self.ask(opt::SET_META_CONTEXT, &data, out);
    }

    fn ask_to_go(&mut self, out: &mut Vec<u8>) {
        let data = [&string(&self.export)[..], &1u16.to_be_bytes(), &info::BLOCK_SIZE.to_be_bytes()].concat();
        self.ask(opt::GO, &data, out);
    }

    fn ask_by_name(&mut self, out: &mut Vec<u8>) {
        let name = std::mem::take(&mut self.export);
        self.ask(opt::EXPORT_NAME, name.as_bytes(), out);
        (self.export, self.state) = (name, State::ExportName);
    }

    fn context(&mut self, fields: &mut Fields<'_>) -> Result<()> {
        let number = fields.u32().ok_or_else(|| Error::malformed("a metadata context has no number"))?;
        if fields.0 != Context::Allocation.name().as_bytes() {
            // Not asked for, so it does no harm either.
            return Ok(());
        }
        match self.base_allocation.replace(number) {
            None => Ok(()),
            Some(_) => Err(Error::malformed("the metadata context base:allocation has two numbers")),
        }
    }

    fn info(&mut self, fields: &mut Fields<'_>) -> Result<()> {
        match fields.u16() {
            Some(info::EXPORT) => self.export_facts(fields),
            Some(info::BLOCK_SIZE) => {
                let (minimum, preferred, maximum) = (fields.u32(), fields.u32(), fields.u32());
                self.block_sizes = block_sizes(minimum, preferred, maximum)?;
                Ok(())
            }
            Some(_) => Ok(()),
            None => Err(Error::malformed("a fact of the export has no number")),
        }
    }

    fn export_facts(&mut self, fields: &mut Fields<'_>) -> Result<()> {
        match (fields.u64(), fields.u16()) {
            (Some(size), Some(_)) if size > i64::MAX as u64 => {
                Err(Error::malformed(format!("the export has {size} bytes, more than 2^63 - 1")))
            }
            (Some(size), Some(flags)) => {
                self.facts = Some((size, flags));
                Ok(())
            }
            _ => Err(Error::malformed("the export's size and flags have fewer than 10 bytes")),
        }
    }

    fn session(&self) -> Result<Session> {
        let (size, flags) =
            self.facts.ok_or_else(|| Error::malformed("the server goes without telling the export's size"))?;
        // Without this one the others mean nothing.
        let flags = if flags & transmission_flag::HAS_FLAGS == 0 { 0 } else { flags };
        Ok(Session {
            size,
            flags,
            block_sizes: self.block_sizes,
            structured_replies: self.structured_replies,
            base_allocation: self.base_allocation,
        })
    }
}

fn block_sizes(minimum: Option<u32>, preferred: Option<u32>, maximum: Option<u32>) -> Result<BlockSizes> {
    let (Some(minimum), Some(preferred), Some(maximum)) = (minimum, preferred, maximum) else {
        return Err(Error::malformed("the export's block sizes have fewer than 12 bytes"));
    };
    let fits = minimum.is_power_of_two()
        && minimum <= 64 << 10
        && preferred.is_power_of_two()
        && (minimum..=32 << 20).contains(&preferred)
        && maximum >= minimum
        && (maximum.is_multiple_of(minimum) || maximum == u32::MAX);
    match fits {
        true => Ok(BlockSizes { minimum, preferred, maximum }),
        false => Err(Error::malformed(format!(
            "the export's block sizes cannot be: {minimum} at least, {preferred} preferred, {maximum} at most"
        ))),
    }
}

/// A string behind its length. It is within the protocol's bound: an address' export is.
fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

/// Nothing is left over on this side of it, in either direction.
fn border(behind: &[u8], unsent: &[u8]) -> Result<()> {
    match () {
        () if !unsent.is_empty() => Err(Error::malformed("the server answers STARTTLS before it was asked")),
        () if !behind.is_empty() => Err(Error::malformed("bytes in plain came behind the ACK to STARTTLS")),
        () => Ok(()),
    }
}

/// A server that does not speak TLS, which is then not spoken to at all.
fn no_tls(why: &str, data: &[u8]) -> Error {
    Error::unsupported(format!(
        "the server has no TLS ({why}){}: start it with certificates (qemu-nbd: --tls-creds, nbdkit: --tls=require, \
         blkmirror: --tls)",
        said(data)
    ))
}

/// What a server adds to a refusal, made harmless to print.
fn said(data: &[u8]) -> String {
    match data {
        [] => String::new(),
        words => format!(": {:?}", String::from_utf8_lossy(&words[..words.len().min(STRING_LEN_MAX)])),
    }
}
