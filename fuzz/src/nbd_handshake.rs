//! Any bytes, in any pieces, against a handshake written again from the protocol's sentences.
//!
//! The right answer is known for every input: which options get which reply, where it ends and how,
//! and how many bytes are left for what follows.
use arbitrary::{Arbitrary, Unstructured};
use formats::nbd::{BlockSizes, ExportInfo, Handshake, Outcome, Style, Tls};

const MAGIC: &[u8] = b"IHAVEOPT";
const LOOKED_AT_MAX: usize = 64 << 10;
const SKIPPED_MAX: usize = 1 << 20;

/// How it ends, with the bytes that are left.
#[derive(Debug, PartialEq)]
enum End {
    More,
    Closed,
    /// Export, style of replies, context, sizes asked for; bytes left.
    Transmission(String, Style, bool, bool, usize),
}

#[derive(Default)]
struct Model {
    fixed: bool,
    zeroes: bool,
    tls: Tls,
    inside_tls: bool,
    /// How many bytes are left where what came in one piece ends.
    ends: Vec<usize>,
    style: Style,
    /// The export that has the context.
    context: Option<String>,
    /// The last reply to each option: what was asked and what was said.
    replies: Vec<(u32, u32)>,
    /// Length of EXPORT_NAME's answer.
    tail: usize,
}

fn exports() -> Vec<ExportInfo> {
    let export = |name: &str, minimum| ExportInfo {
        name: name.into(),
        description: "words".into(),
        size: 1 << 30,
        read_only: false,
        multi_conn: false,
        fast_zero: false,
        block_sizes: BlockSizes { minimum, ..BlockSizes::default() },
        bitmaps: Vec::new(),
    };
    vec![export("a", 1), export("bc", 512)]
}

/// The name and sizes' minimum of the export that `name` means.
fn find(name: &[u8]) -> Option<(String, u32)> {
    match name {
        b"" | b"a" => Some(("a".into(), 1)),
        b"bc" => Some(("bc".into(), 512)),
        _ => None,
    }
}

fn number(bytes: &[u8]) -> usize {
    bytes.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte))
}

/// A string behind its length, and what follows it: `Err` is the reply to what is wrong.
fn string(data: &[u8]) -> Result<(&[u8], &[u8]), u32> {
    if data.len() < 4 || data.len() - 4 < number(&data[..4]) {
        return Err(INVALID);
    }
    let (text, rest) = data[4..].split_at(number(&data[..4]));
    match text.len() {
        4097.. => Err(TOO_BIG),
        _ if std::str::from_utf8(text).is_err() => Err(INVALID),
        _ => Ok((text, rest)),
    }
}

const ACK: u32 = 1;
const POLICY: u32 = 0x8000_0002;
const TLS_REQUIRED: u32 = 0x8000_0005;
const UNSUP: u32 = 0x8000_0001;
const INVALID: u32 = 0x8000_0003;
const UNKNOWN: u32 = 0x8000_0006;
const SIZES_FIRST: u32 = 0x8000_0008;
const TOO_BIG: u32 = 0x8000_0009;
const EXTENDED_CHOSEN: u32 = 0x8000_000a;

impl Model {
    fn converse(&mut self, mut said: &[u8]) -> End {
        if said.len() < 4 {
            return End::More;
        }
        let flags = number(&said[..4]);
        said = &said[4..];
        if flags > 3 {
            return End::Closed;
        }
        (self.fixed, self.zeroes) = (flags & 1 != 0, flags & 2 == 0);
        loop {
            if said.len() < 16 {
                return End::More;
            }
            let (option, len) = (number(&said[8..12]) as u32, number(&said[12..16]));
            if self.replies.len() == 4096 || &said[..8] != MAGIC || (!self.fixed && option != 1) || len > SKIPPED_MAX {
                return End::Closed;
            }
            if len > LOOKED_AT_MAX && option == 1 {
                return End::Closed;
            }
            said = &said[16..];
            if option == 10 {
                self.context = None;
            }
            if said.len() < len {
                return End::More;
            }
            let (data, rest) = said.split_at(len);
            said = rest;
            let lacks_tls = self.tls == Tls::Required && !self.inside_tls;
            match option {
                1 if lacks_tls => return End::Closed,
                2 | 5 => {}
                _ if lacks_tls => {
                    self.replies.push((option, TLS_REQUIRED));
                    continue;
                }
                _ => {}
            }
            match option {
                1 => return self.export_name(data, said.len()),
                _ if len > LOOKED_AT_MAX => self.replies.push((option, TOO_BIG)),
                2 => {
                    self.replies.push((option, ACK));
                    return End::Closed;
                }
                6 | 7 => match self.info(data) {
                    Ok((name, told)) => {
                        self.replies.push((option, ACK));
                        if option == 7 {
                            return self.transmission(name, told, said.len());
                        }
                    }
                    Err(kind) => self.replies.push((option, kind)),
                },
                3 | 8 | 11 => {
                    let kind = match option {
                        _ if !data.is_empty() => INVALID,
                        8 if self.style == Style::Extended => EXTENDED_CHOSEN,
                        _ => ACK,
                    };
                    match (option, kind) {
                        (8, ACK) => self.style = Style::Structured,
                        (11, ACK) => self.style = Style::Extended,
                        _ => {}
                    }
                    self.replies.push((option, kind));
                }
                5 => {
                    let kind = match self.tls {
                        Tls::Off => POLICY,
                        _ if self.inside_tls || !data.is_empty() => INVALID,
                        _ if !self.ends.contains(&said.len()) => return End::Closed,
                        _ => ACK,
                    };
                    if kind == ACK {
                        (self.inside_tls, self.style, self.context) = (true, Style::Simple, None);
                    }
                    self.replies.push((option, kind));
                }
                9 | 10 => {
                    let kind = self.contexts(option, data);
                    self.replies.push((option, kind));
                }
                _ => self.replies.push((option, UNSUP)),
            }
        }
    }

    fn export_name(&mut self, name: &[u8], left: usize) -> End {
        match find(name) {
            Some((name, 1)) => {
                self.tail = if self.zeroes { 134 } else { 10 };
                self.transmission(name, false, left)
            }
            _ => End::Closed,
        }
    }

    fn transmission(&self, name: String, told: bool, left: usize) -> End {
        let context = self.context.as_ref() == Some(&name);
        End::Transmission(name, self.style, context, told, left)
    }

    fn info(&self, data: &[u8]) -> Result<(String, bool), u32> {
        let (name, rest) = string(data)?;
        if rest.len() < 2 || rest.len() - 2 != number(&rest[..2]) * 2 {
            return Err(INVALID);
        }
        let told = rest[2..].chunks(2).any(|wish| wish == [0, 3]);
        match find(name) {
            None => Err(UNKNOWN),
            Some((_, minimum)) if minimum > 1 && !told => Err(SIZES_FIRST),
            Some((name, _)) => Ok((name, told)),
        }
    }

    fn contexts(&mut self, option: u32, data: &[u8]) -> u32 {
        if option == 10 && self.style == Style::Simple {
            return INVALID;
        }
        let queries = |data| -> Result<(&[u8], bool), u32> {
            let (name, rest) = string(data)?;
            if rest.len() < 4 {
                return Err(INVALID);
            }
            let (mut rest, mut chosen) = (&rest[4..], false);
            for _ in 0..number(&data[4 + name.len()..][..4]) {
                let (query, after) = string(rest)?;
                chosen |= query == b"base:allocation";
                rest = after;
            }
            if rest.is_empty() { Ok((name, chosen)) } else { Err(INVALID) }
        };
        match queries(data).map(|(name, chosen)| (find(name), chosen)) {
            Err(kind) => kind,
            Ok((None, _)) => UNKNOWN,
            Ok((Some((name, _)), chosen)) => {
                if option == 10 && chosen {
                    self.context = Some(name);
                }
                ACK
            }
        }
    }
}

/// In pieces of the sizes that `cuts` says.
fn pieces<'a>(mut said: &'a [u8], cuts: &[u8]) -> Vec<&'a [u8]> {
    let mut cuts = cuts.iter().cycle();
    let mut pieces = Vec::new();
    while !said.is_empty() {
        // Long input in small pieces would take long and show nothing.
        let cut = |cut: &u8| usize::from(*cut) * usize::from(*cut) + 1 + said.len() / 64;
        let len = cuts.next().map_or(said.len(), cut);
        let (piece, rest) = said.split_at(len.min(said.len()));
        pieces.push(piece);
        said = rest;
    }
    pieces
}

/// What the code under test makes of it. What comes after STARTTLS is what was inside TLS.
fn real(tls: Tls, pieces: &[&[u8]]) -> (Vec<u8>, End) {
    let mut out = Vec::new();
    let mut handshake = Handshake::new(tls, &mut out);
    out.clear();
    for (index, piece) in pieces.iter().enumerate() {
        let mut piece = *piece;
        while !piece.is_empty() {
            match handshake.step(&mut piece, &exports()[..], &mut out) {
                Outcome::More => {}
                Outcome::StartTls => assert!(piece.is_empty(), "bytes in plain went into TLS"),
                Outcome::Closed(_) => return (out, End::Closed),
                Outcome::Transmission(n) => {
                    let left = piece.len() + pieces[index + 1..].iter().map(|piece| piece.len()).sum::<usize>();
                    let context = !n.contexts.is_empty();
                    return (out, End::Transmission(n.export.name, n.style, context, n.block_sizes_told, left));
                }
            }
        }
    }
    (out, End::More)
}

/// The last reply to each option. Information replies come before it.
fn replies(mut out: &[u8], tail: usize) -> Vec<(u32, u32)> {
    let mut replies = Vec::new();
    while out.len() > tail {
        assert_eq!(number(&out[..8]), 0x0003_e889_0455_65a9);
        let (option, kind, len) = (number(&out[8..12]) as u32, number(&out[12..16]) as u32, number(&out[16..20]));
        if kind == ACK || kind >> 31 == 1 {
            replies.push((option, kind));
        } else {
            assert!(matches!((option, kind), (3, 2) | (6 | 7, 3) | (9 | 10, 4)), "reply {kind} to option {option}");
        }
        out = &out[20 + len..];
    }
    assert_eq!(out.len(), tail);
    replies
}

/// What a client says: mostly options, so that few inputs end at the first magic number.
#[derive(Arbitrary, Debug)]
enum Said<'a> {
    Option(u8, Data<'a>),
    OtherOption(u32, &'a [u8]),
    /// So many thousand bytes.
    Long(u8, u8),
    Bytes(&'a [u8]),
}

#[derive(Arbitrary, Debug)]
enum Data<'a> {
    Bytes(&'a [u8]),
    Name(Name<'a>),
    Info(Name<'a>, Vec<u8>),
    Queries(Name<'a>, Vec<Query<'a>>, &'a [u8]),
}

#[derive(Arbitrary, Debug)]
enum Name<'a> {
    Default,
    A,
    Bc,
    Other(&'a [u8]),
    Long(u8),
}

#[derive(Arbitrary, Debug)]
enum Query<'a> {
    Allocation,
    Base,
    Other(&'a [u8]),
    Long(u8),
}

impl Name<'_> {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Default => Vec::new(),
            Self::A => b"a".to_vec(),
            Self::Bc => b"bc".to_vec(),
            Self::Other(bytes) => bytes.to_vec(),
            Self::Long(more) => vec![b'x'; 4000 + usize::from(*more)],
        }
    }
}

impl Query<'_> {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Allocation => b"base:allocation".to_vec(),
            Self::Base => b"base:".to_vec(),
            Self::Other(bytes) => bytes.to_vec(),
            Self::Long(more) => vec![b'x'; 4000 + usize::from(*more)],
        }
    }
}

fn with_len(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_be_bytes(), bytes].concat()
}

impl Data<'_> {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Bytes(bytes) => bytes.to_vec(),
            Self::Name(name) => name.bytes(),
            Self::Info(name, wishes) => {
                let count = (wishes.len() as u16).to_be_bytes();
                let wishes: Vec<u8> = wishes.iter().flat_map(|wish| [0, *wish]).collect();
                [with_len(&name.bytes()), count.to_vec(), wishes].concat()
            }
            Self::Queries(name, queries, surplus) => {
                let count = (queries.len() as u32).to_be_bytes();
                let queries = queries.iter().flat_map(|query| with_len(&query.bytes())).collect();
                [with_len(&name.bytes()), count.to_vec(), queries, surplus.to_vec()].concat()
            }
        }
    }
}

impl Said<'_> {
    fn bytes(&self) -> Vec<u8> {
        let option = |number: u32, data: &[u8]| [MAGIC, &number.to_be_bytes(), &with_len(data)].concat();
        match self {
            Self::Option(number, data) => option((number % 13).into(), &data.bytes()),
            Self::OtherOption(number, data) => option(*number, data),
            Self::Long(number, thousands) => option((number % 13).into(), &vec![0; usize::from(*thousands) * 1000]),
            Self::Bytes(bytes) => bytes.to_vec(),
        }
    }
}

/// Has a handshake as `data` says and compares.
pub fn run(data: &[u8]) {
    type Input<'a> = (&'a [u8], u8, Vec<Said<'a>>);
    let Ok((cuts, flags, said)) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let tls = [Tls::Off, Tls::Allowed, Tls::Required][usize::from(flags / 5 % 3)];
    let flags = if flags == 255 { Vec::new() } else { u32::from(flags % 5).to_be_bytes().to_vec() };
    let said = said.iter().fold(flags, |mut said, more| {
        said.extend(more.bytes());
        said
    });
    let pieces = pieces(&said, cuts);
    let left = |count| said.len() - pieces[..count].iter().map(|piece| piece.len()).sum::<usize>();
    let ends = (1..=pieces.len()).map(left).collect();
    let mut model = Model { tls, ends, ..Model::default() };
    let end = model.converse(&said);
    let (out, real_end) = real(tls, &pieces);
    assert_eq!(real_end, end);
    assert_eq!(replies(&out, model.tail), model.replies);
}
