//! Any header under anything that can be negotiated: inside the disk and allowed it is done, else
//! it is refused with the protocol's error, and nobody loses count of the bytes that follow.
use arbitrary::{Arbitrary, Unstructured};
use formats::nbd::request::{PAYLOAD_SKIP_MAX, check, check_filter};
use formats::nbd::wire::Header;
use formats::nbd::{Action, BlockSizes, Context, Errno, ExportInfo, Negotiated, Style, Verdict};

#[derive(Arbitrary, Debug)]
struct Input {
    size: u64,
    read_only: bool,
    fast_zero: bool,
    style: u8,
    contexts: bool,
    minimum_bits: u8,
    maximum: u32,
    magic: Option<u32>,
    header: [u8; 28],
    filter: Vec<u8>,
}

/// Checks the request that `data` says.
pub fn run(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let style = [Style::Simple, Style::Structured, Style::Extended][usize::from(input.style % 3)];
    let extended = style == Style::Extended;
    let magic = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
    let mut bytes = [0; 32];
    bytes[..4].copy_from_slice(&input.magic.unwrap_or(magic).to_be_bytes());
    bytes[4..].copy_from_slice(&input.header);
    let Some(header) = Header::parse(style, &bytes[..Header::bytes(style)]) else {
        assert!(input.magic.is_some_and(|found| found != magic));
        return;
    };
    let size = input.size & i64::MAX as u64;
    let minimum = 1 << (input.minimum_bits % 17);
    let negotiated = Negotiated {
        export: ExportInfo {
            name: "a".into(),
            description: String::new(),
            size,
            read_only: input.read_only,
            multi_conn: false,
            fast_zero: input.fast_zero,
            block_sizes: BlockSizes { minimum, preferred: 1 << 16, maximum: input.maximum },
            bitmaps: Vec::new(),
        },
        style,
        contexts: if input.contexts { vec![(1, Context::Allocation), (2, Context::Depth)] } else { Vec::new() },
        block_sizes_told: true,
    };

    let Header { flags, command, offset, len, .. } = header;
    assert!(extended || len <= u64::from(u32::MAX));
    let end = u128::from(offset) + u128::from(len);
    let inside = end <= u128::from(size);
    let aligned = offset % u64::from(minimum) == 0 && len % u64::from(minimum) == 0;
    let fits = len > 0 && inside && aligned;
    let has_payload = command == 1 || (extended && flags & 32 != 0);
    let payload = if has_payload { len } else { 0 };
    let filter = has_payload && command == 7;
    let own_flags = match command {
        0 if style != Style::Simple => 4,
        1 if extended => 32,
        7 if extended && input.contexts => 8 | 32,
        6 if input.fast_zero => 2 | 16,
        6 => 2,
        7 => 8,
        _ => 0,
    };
    let may = flags & !own_flags & !1 == 0
        && match command {
            0 => fits && len <= input.maximum.into(),
            1 => fits && len <= input.maximum.into() && !input.read_only,
            3 => offset == 0 && len == 0,
            4 | 6 => fits && !input.read_only,
            5 => fits,
            7 if filter => matches!(len, 12 | 16),
            7 => fits && input.contexts,
            _ => false,
        };

    match check(&negotiated, &header) {
        Verdict::Disconnect => assert_eq!(command, 2),
        Verdict::Filter(payload_len) => {
            assert!(may && filter && payload_len as u64 == len);
            if input.filter.len() == payload_len {
                filtered(&negotiated, &header, &input.filter);
            }
        }
        Verdict::Hangup => assert!(payload > PAYLOAD_SKIP_MAX),
        Verdict::Refuse(refusal) => {
            assert!(!may && command != 2);
            assert_eq!(refusal.payload_len, payload);
            match refusal.error {
                Errno::Perm => assert!(input.read_only && matches!(command, 1 | 4 | 6)),
                Errno::NoSpace => assert!(!inside && matches!(command, 1 | 6)),
                Errno::Inval => {}
                other => panic!("no reason for {other:?}"),
            }
        }
        Verdict::Do(action) => {
            assert!(may && !filter);
            let range = match action {
                Action::Read { range, .. } | Action::Write { range, .. } | Action::Trim { range, .. } => range,
                Action::WriteZeroes { range, .. } | Action::BlockStatus { range, .. } | Action::Cache { range } => {
                    range
                }
                Action::Flush => return,
            };
            assert_eq!((range.start, u128::from(range.end)), (offset, end));
        }
    }
}

/// A filter is a length, which must fit, and the numbers 1 and 2, each once.
fn filtered(negotiated: &Negotiated, header: &Header, payload: &[u8]) {
    let (len, numbers) = payload.split_at(8);
    let len = u64::from_be_bytes(len.try_into().expect("eight bytes"));
    let minimum = u64::from(negotiated.export.block_sizes.minimum);
    let inside = u128::from(header.offset) + u128::from(len) <= u128::from(negotiated.export.size);
    let fits = len > 0 && inside && (header.offset | len).is_multiple_of(minimum);
    let numbers: Vec<_> =
        numbers.chunks(4).map(|number| u32::from_be_bytes(number.try_into().expect("four"))).collect();
    let known = matches!(numbers[..], [1] | [2] | [1, 2] | [2, 1]);
    match check_filter(negotiated, header, payload) {
        Verdict::Do(Action::BlockStatus { range, contexts, .. }) => {
            assert!(fits && known && contexts.count() == numbers.len());
            assert_eq!((range.start, range.len()), (header.offset, len));
        }
        Verdict::Refuse(refusal) => assert!(!(fits && known) && refusal.payload_len == 0),
        other => panic!("no reason for {other:?}"),
    }
}
