//! Each command with each flag, at each border, against tables that say what the protocol says.
use super::*;
use crate::nbd::context::Context;
use crate::nbd::export::{BlockSizes, ExportInfo};
use proptest::prelude::*;

const SIZE: u64 = 1 << 30;
const PAYLOAD_MAX: u64 = 32 << 20;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const WRITE_ZEROES: u16 = 6;
const BLOCK_STATUS: u16 = 7;
const RESIZE: u16 = 8;
const RANGED: [u16; 6] = [READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS];
const CHANGING: [u16; 3] = [WRITE, TRIM, WRITE_ZEROES];

/// Everything negotiated, everything announced.
fn negotiated() -> Negotiated {
    Negotiated {
        export: ExportInfo {
            name: "vda".into(),
            description: String::new(),
            size: SIZE,
            read_only: false,
            multi_conn: true,
            fast_zero: true,
            block_sizes: BlockSizes::default(),
            bitmaps: Vec::new(),
        },
        style: Style::Structured,
        contexts: vec![(1, Context::Allocation)],
        block_sizes_told: true,
    }
}

fn header(command: u16, flags: u16, offset: u64, len: u64) -> Header {
    Header { flags, command, cookie: 7, offset, len }
}

/// The error and how much payload is to be skipped; `None` where it may be done.
fn refused(negotiated: &Negotiated, header: Header) -> Option<(Errno, u64)> {
    match check(negotiated, &header) {
        Verdict::Do(_) => None,
        Verdict::Refuse(refusal) => Some((refusal.error, refusal.payload_len)),
        other => panic!("{header:?}: {other:?}"),
    }
}

#[test]
fn right_requests_become_actions() {
    let n = negotiated();
    let range = ByteRange { start: 512, end: 1024 };
    let cases = [
        (READ, 0, Action::Read { range, unfragmented: false }),
        (READ, flag::DF | flag::FUA, Action::Read { range, unfragmented: true }),
        (WRITE, 0, Action::Write { range, fua: false }),
        (WRITE, flag::FUA, Action::Write { range, fua: true }),
        (TRIM, 0, Action::Trim { range, fua: false }),
        (TRIM, flag::FUA, Action::Trim { range, fua: true }),
        (WRITE_ZEROES, 0, Action::WriteZeroes { range, fua: false, keep: false, fast: false }),
        (WRITE_ZEROES, flag::NO_HOLE, Action::WriteZeroes { range, fua: false, keep: true, fast: false }),
        (WRITE_ZEROES, flag::FUA | flag::FAST_ZERO, Action::WriteZeroes { range, fua: true, keep: false, fast: true }),
        (CACHE, 0, Action::Cache { range }),
        (BLOCK_STATUS, 0, Action::BlockStatus { range, one: false, contexts: Selection(1) }),
        (BLOCK_STATUS, flag::REQ_ONE | flag::FUA, Action::BlockStatus { range, one: true, contexts: Selection(1) }),
    ];
    for (command, flags, action) in cases {
        assert_eq!(check(&n, &header(command, flags, 512, 512)), Verdict::Do(action));
    }
    assert_eq!(check(&n, &header(FLUSH, 0, 0, 0)), Verdict::Do(Action::Flush));
    assert_eq!(check(&n, &header(FLUSH, flag::FUA, 0, 0)), Verdict::Do(Action::Flush));
}

#[test]
fn each_command_takes_its_own_flags_and_fua() {
    let n = negotiated();
    for command in [READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
        let own = match command {
            READ => flag::DF,
            WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
            BLOCK_STATUS => flag::REQ_ONE,
            _ => 0,
        };
        let len = if command == FLUSH { 0 } else { 512 };
        let payload = if command == WRITE { 512 } else { 0 };
        for bit in 0..16 {
            let flags = 1 << bit;
            let want = (flags & (own | flag::FUA) == 0).then_some((Errno::Inval, payload));
            assert_eq!(refused(&n, header(command, flags, 0, len)), want, "command {command}, flag {flags:#x}");
        }
    }
}

#[test]
fn flags_that_were_not_announced_are_refused() {
    let mut n = negotiated();
    n.style = Style::Simple;
    n.export.fast_zero = false;
    assert_eq!(refused(&n, header(READ, flag::DF, 0, 512)), Some((Errno::Inval, 0)));
    assert_eq!(refused(&n, header(WRITE_ZEROES, flag::FAST_ZERO, 0, 512)), Some((Errno::Inval, 0)));
}

#[test]
fn ends_past_the_disk_are_einval_for_reads_and_enospc_for_writes() {
    let n = negotiated();
    for command in RANGED {
        let error = if [WRITE, WRITE_ZEROES].contains(&command) { Errno::NoSpace } else { Errno::Inval };
        for (offset, len, fits) in [
            (SIZE - 512, 512, true),
            (SIZE - 1, 1, true),
            (SIZE - 512, 513, false),
            (SIZE, 1, false),
            (u64::MAX, 1, false),
            (u64::MAX - 511, 512, false),
            (i64::MAX as u64, 512, false),
            (1 << 63, 512, false),
        ] {
            let payload = if command == WRITE { len } else { 0 };
            let want = (!fits).then_some((error, payload));
            assert_eq!(refused(&n, header(command, 0, offset, len)), want, "command {command}, {len} at {offset}");
        }
    }
}

#[test]
fn lengths_have_bounds() {
    let n = negotiated();
    for command in RANGED {
        let payload = |len| if command == WRITE { len } else { 0 };
        assert_eq!(refused(&n, header(command, 0, 0, 0)), Some((Errno::Inval, 0)), "command {command}, nothing");
        assert_eq!(refused(&n, header(command, 0, 0, PAYLOAD_MAX)), None);
        let held = [READ, WRITE].contains(&command);
        let want = held.then_some((Errno::Inval, payload(PAYLOAD_MAX + 1)));
        assert_eq!(refused(&n, header(command, 0, 0, PAYLOAD_MAX + 1)), want, "command {command}");
    }
    // Without payload all of the disk can be meant.
    for command in [TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
        assert_eq!(refused(&n, header(command, 0, 0, SIZE)), None);
    }
    let mut large = negotiated();
    large.export.size = 1 << 40;
    for command in [TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
        assert_eq!(refused(&large, header(command, 0, 0, u32::MAX.into())), None);
    }
}

#[test]
fn a_payload_is_skipped_up_to_a_bound_then_the_client_is_dropped() {
    let n = negotiated();
    let skipped = Some((Errno::Inval, PAYLOAD_SKIP_MAX));
    assert_eq!(refused(&n, header(WRITE, 0, 0, PAYLOAD_SKIP_MAX)), skipped);
    assert_eq!(check(&n, &header(WRITE, 0, 0, PAYLOAD_SKIP_MAX + 1)), Verdict::Hangup);
    assert_eq!(check(&n, &header(WRITE, !0, u64::MAX, u32::MAX.into())), Verdict::Hangup);
    assert_eq!(refused(&n, header(READ, 0, 0, u32::MAX.into())), Some((Errno::Inval, 0)));
}

#[test]
fn a_read_only_export_refuses_every_change_and_answers_the_rest() {
    let mut n = negotiated();
    n.export.read_only = true;
    for command in RANGED {
        let payload = if command == WRITE { 512 } else { 0 };
        let want = CHANGING.contains(&command).then_some((Errno::Perm, payload));
        assert_eq!(refused(&n, header(command, 0, 0, 512)), want, "command {command}");
        // Also where it would be out of range: what it may not do at all comes first.
        if CHANGING.contains(&command) {
            assert_eq!(refused(&n, header(command, 0, SIZE, 512)), Some((Errno::Perm, payload)));
        }
    }
    assert_eq!(refused(&n, header(FLUSH, 0, 0, 0)), None);
}

#[test]
fn block_status_needs_its_context() {
    let mut n = negotiated();
    n.contexts.clear();
    assert_eq!(refused(&n, header(BLOCK_STATUS, 0, 0, 512)), Some((Errno::Inval, 0)));
}

#[test]
fn a_payload_of_block_status_needs_extended_headers_and_contexts() {
    let mut n = negotiated();
    assert_eq!(refused(&n, header(BLOCK_STATUS, flag::PAYLOAD_LEN, 0, 12)), Some((Errno::Inval, 0)));
    n.style = Style::Extended;
    assert_eq!(check(&n, &header(BLOCK_STATUS, flag::PAYLOAD_LEN, 0, 12)), Verdict::Filter(12));
    for len in [0, 8, 11, 13, 16, 1 << 20] {
        let want = Some((Errno::Inval, len));
        assert_eq!(refused(&n, header(BLOCK_STATUS, flag::PAYLOAD_LEN, 0, len)), want, "{len} bytes");
    }
    // It was an assertion in qemu-nbd.
    n.contexts.clear();
    assert_eq!(refused(&n, header(BLOCK_STATUS, flag::PAYLOAD_LEN, 0, 12)), Some((Errno::Inval, 12)));
}

#[test]
fn a_filter_names_contexts_that_were_negotiated_once_each() {
    let mut n = negotiated();
    n.style = Style::Extended;
    n.contexts = vec![(1, Context::Allocation), (2, Context::Depth), (5, Context::Bitmap("b".into()))];
    let judge = |len: u64, numbers: &[u32]| {
        let numbers = numbers.iter().flat_map(|number| number.to_be_bytes());
        let payload: Vec<u8> = len.to_be_bytes().into_iter().chain(numbers).collect();
        check_filter(&n, &header(BLOCK_STATUS, flag::PAYLOAD_LEN | flag::REQ_ONE, 512, payload.len() as u64), &payload)
    };
    let range = ByteRange { start: 512, end: SIZE };
    let want = Action::BlockStatus { range, one: true, contexts: Selection(0b101) };
    assert_eq!(judge(SIZE - 512, &[5, 1]), Verdict::Do(want));
    for (len, numbers) in [(512, &[1, 1][..]), (512, &[3]), (512, &[1, 2, 6]), (0, &[1]), (SIZE, &[1])] {
        let verdict = judge(len, numbers);
        assert!(matches!(verdict, Verdict::Refuse(Refusal { error: Errno::Inval, payload_len: 0, .. })), "{numbers:?}");
    }
}

#[test]
fn with_extended_headers_a_flag_says_whether_a_payload_follows() {
    let mut n = negotiated();
    n.style = Style::Extended;
    n.export.size = 1 << 50;
    assert_eq!(refused(&n, header(WRITE, flag::PAYLOAD_LEN, 0, 512)), None);
    assert_eq!(refused(&n, header(WRITE, 0, 0, 512)), None, "QEMU's client leaves the flag out");
    // Of an unknown command too: its payload was once taken for the next header.
    for command in [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, 99] {
        assert_eq!(refused(&n, header(command, flag::PAYLOAD_LEN, 0, 512)), Some((Errno::Inval, 512)));
        assert_eq!(check(&n, &header(command, flag::PAYLOAD_LEN, 0, PAYLOAD_SKIP_MAX + 1)), Verdict::Hangup);
    }
    for command in [TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
        assert_eq!(refused(&n, header(command, 0, 0, 1 << 49)), None, "command {command}: 64 bits of length");
    }
}

#[test]
fn unknown_commands_have_no_payload_unless_a_flag_says_so() {
    let n = negotiated();
    for command in [RESIZE, 9, 255, u16::MAX] {
        assert_eq!(refused(&n, header(command, 0, 0, 4096)), Some((Errno::Inval, 0)), "command {command}");
    }
}

#[test]
fn a_flush_has_no_range() {
    let n = negotiated();
    assert_eq!(refused(&n, header(FLUSH, 0, 512, 0)), Some((Errno::Inval, 0)));
    assert_eq!(refused(&n, header(FLUSH, 0, 0, 512)), Some((Errno::Inval, 0)));
}

#[test]
fn disconnect_is_heeded_whatever_it_carries() {
    assert_eq!(check(&negotiated(), &header(DISC, 0, 0, 0)), Verdict::Disconnect);
    assert_eq!(check(&negotiated(), &header(DISC, !0, 1, 1)), Verdict::Disconnect);
}

#[test]
fn a_minimum_block_size_is_kept_to() {
    let mut n = negotiated();
    n.export.block_sizes.minimum = 512;
    for command in RANGED {
        for (offset, len, fits) in [(0, 512, true), (512, 1024, true), (256, 512, false), (512, 100, false)] {
            let payload = if command == WRITE { len } else { 0 };
            let want = (!fits).then_some((Errno::Inval, payload));
            assert_eq!(refused(&n, header(command, 0, offset, len)), want, "command {command}, {len} at {offset}");
        }
    }
}

fn style() -> impl Strategy<Value = Style> {
    prop::sample::select(vec![Style::Simple, Style::Structured, Style::Extended])
}

/// Numbers around the borders, and any.
fn number() -> impl Strategy<Value = u64> {
    let borders = [0, 1, 511, 512, PAYLOAD_MAX, PAYLOAD_SKIP_MAX, SIZE, 1 << 32, 1 << 63, u64::MAX];
    let near = (prop::sample::select(borders.to_vec()), -2_i64..3).prop_map(|(at, by)| at.wrapping_add_signed(by));
    prop_oneof![near, any::<u64>(), 0..SIZE]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Written again, slowly, from the protocol's sentences.
    #[test]
    fn what_passes_is_inside_the_disk_and_allowed(
        command in 0_u16..10, flags in 0_u16..64, offset in number(), len in number(),
        read_only: bool, style in style(), fast_zero: bool, contexts: bool,
    ) {
        let extended = style == Style::Extended;
        let len = if extended { len } else { len & u64::from(u32::MAX) };
        let mut n = negotiated();
        n.export.read_only = read_only;
        n.export.fast_zero = fast_zero;
        n.style = style;
        if !contexts {
            n.contexts.clear();
        }
        let flagged = extended && flags & flag::PAYLOAD_LEN != 0;
        let has_payload = flagged || command == WRITE;
        let filter = command == BLOCK_STATUS && has_payload;
        let inside = len > 0 && u128::from(offset) + u128::from(len) <= u128::from(SIZE);
        let flags_left = flags & !flag::FUA & !match command {
            READ if style != Style::Simple => flag::DF,
            WRITE if extended => flag::PAYLOAD_LEN,
            BLOCK_STATUS if extended && contexts => flag::REQ_ONE | flag::PAYLOAD_LEN,
            WRITE_ZEROES if fast_zero => flag::NO_HOLE | flag::FAST_ZERO,
            WRITE_ZEROES => flag::NO_HOLE,
            BLOCK_STATUS => flag::REQ_ONE,
            _ => 0,
        };
        let may = flags_left == 0 && match command {
            READ => inside && len <= PAYLOAD_MAX,
            WRITE => inside && len <= PAYLOAD_MAX && !read_only,
            TRIM | WRITE_ZEROES => inside && !read_only,
            CACHE => inside,
            BLOCK_STATUS if filter => contexts && len == 12,
            BLOCK_STATUS => inside && contexts,
            FLUSH => offset == 0 && len == 0,
            _ => false,
        };
        match check(&n, &header(command, flags, offset, len)) {
            Verdict::Do(_) => prop_assert!(may && !filter),
            Verdict::Filter(payload_len) => prop_assert!(may && filter && payload_len == 12),
            Verdict::Disconnect => prop_assert_eq!(command, DISC),
            Verdict::Hangup => prop_assert!(has_payload && len > PAYLOAD_SKIP_MAX),
            Verdict::Refuse(refusal) => {
                prop_assert!(!may && command != DISC);
                prop_assert_eq!(refusal.payload_len, if has_payload { len } else { 0 });
            }
        }
    }
}
