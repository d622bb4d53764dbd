//! Any header under anything that can be negotiated: inside the disk and allowed it is done, else
//! it is refused with the protocol's error, and nobody loses count of the bytes that follow.
use arbitrary::{Arbitrary, Unstructured};
use formats::nbd::request::{PAYLOAD_SKIP_MAX, check};
use formats::nbd::wire::Header;
use formats::nbd::{Action, BlockSizes, Errno, ExportInfo, Negotiated, Verdict};

#[derive(Arbitrary, Debug)]
struct Input {
    size: u64,
    read_only: bool,
    fast_zero: bool,
    structured_replies: bool,
    contexts: bool,
    minimum_bits: u8,
    maximum: u32,
    magic: Option<u32>,
    header: [u8; 24],
}

/// Checks the request that `data` says.
pub fn run(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&input.magic.unwrap_or(0x2560_9513).to_be_bytes());
    bytes[4..].copy_from_slice(&input.header);
    let Some(header) = Header::parse(&bytes) else {
        assert!(input.magic.is_some_and(|magic| magic != 0x2560_9513));
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
        },
        structured_replies: input.structured_replies,
        base_allocation: input.contexts.then_some(1),
        block_sizes_told: true,
    };

    let Header { flags, command, offset, len, .. } = header;
    assert!(len <= u64::from(u32::MAX));
    let end = u128::from(offset) + u128::from(len);
    let inside = end <= u128::from(size);
    let aligned = offset % u64::from(minimum) == 0 && len % u64::from(minimum) == 0;
    let fits = len > 0 && inside && aligned;
    let payload = if command == 1 { len } else { 0 };
    let own_flags = match command {
        0 if input.structured_replies => 4,
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
            7 => fits && input.contexts,
            _ => false,
        };

    match check(&negotiated, &header) {
        Verdict::Disconnect => assert_eq!(command, 2),
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
            assert!(may);
            let range = match action {
                Action::Read { range, .. } | Action::Write { range, .. } | Action::Trim { range, .. } => range,
                Action::WriteZeroes { range, .. } | Action::BlockStatus { range, .. } => range,
                Action::Flush => return,
            };
            assert_eq!((range.start, u128::from(range.end)), (offset, end));
        }
    }
}
