//! Sizes in bytes as people write and read them.

const SUFFIXES: [char; 4] = ['K', 'M', 'G', 'T'];
const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];

/// Bytes from `4096`, `64K`, `10M`, `2G` or `1T`, each suffix 1024 times the one before.
///
/// # Errors
/// What is wrong with the text and what would be right.
pub fn parse(text: &str) -> Result<u64, String> {
    let suffix = text.chars().last().and_then(|last| SUFFIXES.iter().position(|it| *it == last.to_ascii_uppercase()));
    let (digits, shift) = match suffix {
        Some(index) => (&text[..text.len() - 1], 10 * (index as u32 + 1)),
        None => (text, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("expected bytes as a whole number, K, M, G or T behind it".into());
    }
    let count = digits.parse::<u64>().ok();
    count.and_then(|count| count.checked_mul(1 << shift)).ok_or_else(|| "more than 64 bits of bytes".into())
}

/// `bytes` in the largest unit that leaves at least one of it.
pub fn format(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let index = (bytes.ilog2() / 10 - 1).min(4) as usize;
    let count = bytes as f64 / (1u64 << (10 * (index + 1))) as f64;
    // Three digits are enough to read.
    let digits = if count < 10.0 {
        2
    } else if count < 100.0 {
        1
    } else {
        0
    };
    format!("{count:.digits$} {}", UNITS[index])
}

#[cfg(test)]
mod tests {
    use super::{UNITS, format, parse};
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    #[test]
    fn suffixes_are_binary() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("64K", 65536), ("64k", 65536), ("3M", 3 << 20), ("2G", 2 << 30)]
        {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        assert_eq!(parse("16777215T"), Ok(16_777_215 << 40));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "K", "-1", "1.5G", "1 K", "1KB", "+5", "16777216T", "99999999999999999999", "1\u{e9}"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    proptest! {
        /// Any text: digits, then perhaps a suffix, and nothing else.
        #[test]
        fn any_text_is_a_size_or_an_error(text in "[0-9]{0,22}[kKmMgGtTpB.+ \u{130}]{0,2}") {
            let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
            let unit = match text[digits.len()..].to_ascii_uppercase().as_str() {
                "" => Some(1),
                "K" => Some(1u128 << 10),
                "M" => Some(1 << 20),
                "G" => Some(1 << 30),
                "T" => Some(1 << 40),
                _ => None,
            };
            let bytes = digits.parse::<u128>().ok().zip(unit).map(|(count, unit)| count * unit);
            prop_assert_eq!(parse(&text).ok(), bytes.and_then(|bytes| u64::try_from(bytes).ok()));
        }

        /// What people read is within half a unit of its last digit.
        #[test]
        fn what_is_written_is_about_what_it_was(bits in 0..64u32, low in any::<u64>()) {
            let bytes = (1 << bits) | (low & ((1 << bits) - 1));
            let written = format(bytes);
            let (count, unit) = written.split_once(' ').expect("a number and a unit");
            let power = if unit == "B" { 0 } else { 1 + UNITS.iter().position(|it| *it == unit).expect("a unit") };
            let found = count.parse::<f64>().expect("a number") * 1024f64.powi(power as i32);
            prop_assert!((found - bytes as f64).abs() <= bytes as f64 / 190.0, "{bytes}: {written}");
        }
    }

    #[test]
    fn sizes_are_read_in_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (12 << 20, "12.0 MiB"),
            (1536 << 20, "1.50 GiB"),
            (250 << 40, "250 TiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(format(bytes), text);
        }
    }
}
