use super::{Backing, Compression, Header};
use crate::error::Kind;
use crate::qcow2::create::{Create, header_bytes};
use crate::qcow2::data_file::DataFile;

fn bytes(create: &Create) -> Vec<u8> {
    let mut bytes = header_bytes(create).expect("valid options");
    bytes.resize(1 << create.cluster_bits, 0);
    bytes
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// The error for a default header with `field` at `at`.
fn refusal(at: usize, field: &[u8]) -> (Kind, String) {
    let mut bytes = bytes(&Create::new(1 << 30));
    put(&mut bytes, at, field);
    let error = Header::parse(&bytes).expect_err("a wrong header");
    (error.kind(), error.one_line())
}

#[test]
fn what_create_writes_is_what_parse_reads() {
    let backing = Backing { name: "../base.qcow2".into(), format: Some("qcow2".into()) };
    let asked = Create {
        refcount_order: 6,
        cluster_bits: 12,
        compression: Compression::Zstd,
        lazy_refcounts: true,
        backing: Some(backing.clone()),
        ..Create::new(12345 * 512)
    };
    let header = Header::parse(&bytes(&asked)).expect("valid");
    let info = header.info();
    assert_eq!((info.version, info.virtual_size, info.cluster_size, info.refcount_bits), (3, 12345 * 512, 4096, 64));
    assert_eq!(
        (info.compression, info.lazy_refcounts, info.dirty, info.corrupt),
        (Compression::Zstd, true, false, false)
    );
    assert_eq!(info.backing, Some(backing));
    assert_eq!(info.incompatible_features, 1 << 3);
}

fn with_data_file(name: &str, raw: bool) -> Create {
    Create { data_file: Some(DataFile { name: name.into(), raw }), ..Create::new(1 << 30) }
}

#[test]
fn a_data_file_is_a_bit_and_a_name() {
    for raw in [false, true] {
        let asked = with_data_file("d.raw", raw);
        let mut bytes = bytes(&asked);
        let header = Header::parse(&bytes).expect("valid");
        assert_eq!(header.data_file, asked.data_file);
        assert!(header.geometry.external_data && header.check_writable().is_ok());
        // The name's extension is the first. QEMU takes the name alone for nothing, whatever it is.
        put(&mut bytes, 120, b"d\xff");
        put(&mut bytes, 72, &[0; 24]);
        let header = Header::parse(&bytes).expect("valid");
        assert_eq!((header.data_file, header.geometry.external_data), (None, false));
        put(&mut bytes, 72, &4_u64.to_be_bytes());
        let error = Header::parse(&bytes).expect_err("no text").one_line();
        assert!(error.contains("data file") && error.contains("UTF-8"), "{error}");
    }
}

#[test]
fn a_data_file_that_cannot_be_is_not_created_and_not_written() {
    let backing = Some(Backing { name: "base".into(), format: None });
    assert!(header_bytes(&Create { backing: backing.clone(), ..with_data_file("d", false) }).is_ok());
    for asked in [
        Create { backing: backing.clone(), ..with_data_file("d", true) },
        Create { version: 2, ..with_data_file("d", false) },
        with_data_file("", false),
        with_data_file(&"d".repeat(5000), false),
        Create { cluster_bits: 9, ..with_data_file(&"d".repeat(500), false) },
        Create { cluster_bits: 21, size: 1 << 57, ..with_data_file("d", false) },
    ] {
        assert!(header_bytes(&asked).is_err(), "{asked:?}");
    }
    for (at, field, word) in [(88, 2_u64, "backing"), (60, 1 << 32, "snapshots")] {
        let mut bytes = bytes(&Create { backing: backing.clone(), ..with_data_file("d", false) });
        put(&mut bytes, 64, &0x10000_u64.to_be_bytes());
        put(&mut bytes, at, &field.to_be_bytes()[..if at == 60 { 4 } else { 8 }]);
        let header = Header::parse(&bytes).expect("it can be read");
        let error = header.check_writable().expect_err("not writable").one_line();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn version_2_ends_where_it_ends() {
    let backing = Backing { name: "b".repeat(1023), format: None };
    let version_2 = |backing| bytes(&Create { version: 2, backing, ..Create::new(1 << 20) });
    let header = Header::parse(&version_2(Some(backing.clone()))).expect("valid");
    assert_eq!(header.backing, Some(backing));
    // What would be features in version 3 stands behind the end of the extensions here.
    let mut without = version_2(None);
    put(&mut without, 80, &[0xff; 24]);
    let header = Header::parse(&without).expect("valid");
    assert_eq!((header.incompatible, header.compatible, header.autoclear), (0, 0, 0));
    assert_eq!((header.geometry.refcount_order, header.compression), (4, Compression::Zlib));
}

#[test]
fn what_is_not_supported_is_named_with_what_to_do() {
    for (at, field, words) in [
        (4, &4_u32.to_be_bytes()[..], ["version 4", "2 and 3"]),
        (20, &22_u32.to_be_bytes(), ["cluster_bits 22", "2 MiB"]),
        (32, &1_u32.to_be_bytes(), ["AES", "qemu-img convert"]),
        (32, &2_u32.to_be_bytes(), ["LUKS", "qemu-img convert"]),
        (72, &(1_u64 << 63).to_be_bytes(), ["bit 63 (unknown)", "qemu-img convert"]),
        (36, &(1_u32 << 23).to_be_bytes(), ["l1_size 8388608", "32 MiB"]),
        (56, &129_u32.to_be_bytes(), ["refcount_table_clusters 129", "8 MiB"]),
        (60, &65537_u32.to_be_bytes(), ["nb_snapshots 65537", "65536"]),
    ] {
        let (kind, text) = refusal(at, field);
        assert_eq!(kind, Kind::Unsupported, "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
}

#[test]
fn an_unknown_bit_has_its_name_from_the_feature_table() {
    let mut bytes = bytes(&Create::new(1 << 30));
    put(&mut bytes, 72, &(1_u64 << 7).to_be_bytes());
    // The first entry of the table, which stands behind its extension's eight bytes.
    put(&mut bytes, 120, b"\x00\x07time travel\0");
    let error = Header::parse(&bytes).expect_err("an unknown bit").one_line();
    assert!(error.contains("incompatible feature bit 7 (time travel) is not supported"), "{error}");
}

#[test]
fn compression_has_a_bit_and_a_type() {
    let both = |bit: u64, kind: u8| {
        let mut bytes = bytes(&Create::new(1 << 30));
        put(&mut bytes, 72, &bit.to_be_bytes());
        put(&mut bytes, 104, &[kind]);
        Header::parse(&bytes).map(|header| header.compression).map_err(|error| error.kind())
    };
    assert_eq!(both(0, 0), Ok(Compression::Zlib));
    assert_eq!(both(8, 1), Ok(Compression::Zstd));
    assert_eq!(both(8, 2), Err(Kind::Unsupported));
    assert_eq!(both(8, 0), Err(Kind::Malformed));
    assert_eq!(both(0, 1), Err(Kind::Malformed));
}

#[test]
fn wrong_fields_are_named() {
    for (at, field, word) in [
        (0, &b"QFI\0"[..], "QFI"),
        (24, &u64::MAX.to_be_bytes(), "size"),
        (36, &1_u32.to_be_bytes(), "l1_size"),
        (40, &0_u64.to_be_bytes(), "l1_table_offset"),
        (40, &0x1_0200_u64.to_be_bytes(), "l1_table_offset"),
        (48, &u64::MAX.to_be_bytes(), "refcount_table_offset"),
        (48, &0xffff_ffff_ffff_0000_u64.to_be_bytes(), "refcount_table_offset"),
        (56, &0_u32.to_be_bytes(), "refcount_table_clusters"),
        (8, &0xffff_u64.to_be_bytes(), "backing name"),
        (8, &u64::MAX.to_be_bytes(), "backing name"),
        (96, &7_u32.to_be_bytes(), "refcount_order"),
        (100, &96_u32.to_be_bytes(), "header_length"),
        (100, &111_u32.to_be_bytes(), "header_length"),
        (116, &u32::MAX.to_be_bytes(), "extension"),
        (72, &4_u64.to_be_bytes(), "bit 2 (external data file)"),
        (88, &2_u64.to_be_bytes(), "bit 1 (raw external data)"),
    ] {
        let mut bytes = bytes(&Create::new(1 << 30));
        put(&mut bytes, 16, &100_u32.to_be_bytes());
        put(&mut bytes, at, field);
        let error = Header::parse(&bytes).expect_err(word);
        assert!(error.one_line().contains(word), "{}", error.one_line());
        assert_eq!(error.kind(), Kind::Malformed, "{}", error.one_line());
    }
}

#[test]
fn a_header_that_is_cut_is_an_error_or_complete() {
    let asked = Create { backing: Some(Backing { name: "base".into(), format: Some("raw".into()) }), ..Create::new(0) };
    let whole = header_bytes(&asked).expect("valid options");
    let parsed = Header::parse(&whole).expect("complete");
    for len in 0..whole.len() {
        assert!(Header::parse(&whole[..len]).is_err(), "{len} of {} bytes", whole.len());
        if len >= 24 {
            assert_eq!(Header::len_wanted(&whole[..len]).ok(), Some(65536));
        }
    }
    assert_eq!(parsed.backing.map(|backing| backing.name), Some("base".into()));
}

#[test]
fn what_cannot_be_written_can_be_read() {
    for (at, field, word) in [
        (72, &1_u64.to_be_bytes()[..], "(dirty) is set: mend it with `blkmirror check --repair all FILE`"),
        (72, &2_u64.to_be_bytes(), "(corrupt) is set: mend it with `blkmirror check --repair all FILE`"),
    ] {
        let mut bytes = bytes(&Create::new(1 << 30));
        put(&mut bytes, 64, &0x10000_u64.to_be_bytes());
        put(&mut bytes, at, field);
        let header = Header::parse(&bytes).expect("readable");
        let error = header.check_writable().expect_err("not writable").one_line();
        assert!(error.contains(word), "{error}");
    }
}
