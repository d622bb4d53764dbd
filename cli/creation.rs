//! `KEY=VALUE[,KEY=VALUE…]`, as `convert -o` and `mirror -o` have it: qemu-img's options of `create`.
use crate::export::split;
use crate::size;
use engine::control::creation::CreateOptions;
use serde::de::DeserializeOwned;
use serde::de::value::{Error as NameError, StrDeserializer};

const KEYS: &str = "cluster_size, compat, refcount_bits, extended_l2, compression_type, preallocation, \
                    lazy_refcounts, data_file, data_file_raw";

/// One setting of an option.
#[derive(Clone, Debug)]
pub struct Settings(Vec<(String, String)>);

/// The settings of one `-o`. A comma in a value is written twice.
///
/// # Errors
/// Which option is unknown or has a wrong value, and what would be right.
pub fn parse(text: &str) -> Result<Settings, String> {
    let setting = |part: String| match part.split_once('=') {
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => Err(format!("expected KEY=VALUE[,KEY=VALUE…], not '{part}'")),
    };
    let settings = Settings(split(text).into_iter().map(setting).collect::<Result<_, _>>()?);
    all([&settings]).map(|_| settings)
}

/// What all settings together say; of two of one option the last one counts.
///
/// # Errors
/// As `parse`.
pub fn all<'a>(settings: impl IntoIterator<Item = &'a Settings>) -> Result<CreateOptions, String> {
    let mut options = CreateOptions::default();
    for (key, value) in settings.into_iter().flat_map(|settings| &settings.0) {
        set(&mut options, key, value)?;
    }
    Ok(options)
}

fn set(options: &mut CreateOptions, key: &str, value: &str) -> Result<(), String> {
    match key {
        "cluster_size" => options.cluster_size = Some(number(key, value, "a power of two from 512 to 2M")?),
        "compat" => options.compat = Some(one_of(key, value, "0.10 or 1.1")?),
        "refcount_bits" => options.refcount_bits = Some(number(key, value, "a power of two from 1 to 64")?),
        "extended_l2" => options.extended_l2 = Some(switch(key, value)?),
        "compression_type" => options.compression_type = Some(one_of(key, value, "zlib or zstd")?),
        "preallocation" => options.preallocation = Some(one_of(key, value, "off, metadata, falloc or full")?),
        "lazy_refcounts" => options.lazy_refcounts = Some(switch(key, value)?),
        "data_file" => options.data_file = Some(value.to_owned()),
        "data_file_raw" => options.data_file_raw = Some(switch(key, value)?),
        _ => return Err(format!("unknown option '{key}': expected {KEYS}")),
    }
    Ok(())
}

fn number(key: &str, value: &str, range: &str) -> Result<u64, String> {
    let number = size::parse(value).ok().filter(|number| number.is_power_of_two());
    number.ok_or_else(|| wrong(key, value, range))
}

fn switch(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" | "yes" | "true" => Ok(true),
        "off" | "no" | "false" => Ok(false),
        _ => Err(wrong(key, value, "on or off")),
    }
}

/// One of the names that the control API has.
fn one_of<T: DeserializeOwned>(key: &str, value: &str, range: &str) -> Result<T, String> {
    T::deserialize(StrDeserializer::<NameError>::new(value)).map_err(|_| wrong(key, value, range))
}

fn wrong(key: &str, value: &str, range: &str) -> String {
    format!("{key}={value}: expected {range}")
}

#[cfg(test)]
mod tests {
    use super::{all, parse};
    use engine::control::creation::{Compat, CompressionType, CreateOptions, Preallocation};

    #[test]
    fn options_have_the_names_of_qemu_img() {
        let first = parse("cluster_size=128k,compat=1.1,refcount_bits=32,extended_l2=on,compression_type=zstd");
        let second = parse("preallocation=falloc,lazy_refcounts=off,data_file=/a,,b,data_file_raw=on,cluster_size=2M");
        let expected = CreateOptions {
            cluster_size: Some(2 << 20),
            compat: Some(Compat::V3),
            refcount_bits: Some(32),
            extended_l2: Some(true),
            compression_type: Some(CompressionType::Zstd),
            preallocation: Some(Preallocation::Falloc),
            lazy_refcounts: Some(false),
            data_file: Some("/a,b".into()),
            data_file_raw: Some(true),
        };
        let both = [first, second].map(|settings| settings.expect("valid"));
        assert_eq!(all(&both), Ok(expected));
    }

    #[test]
    fn what_is_wrong_is_named_with_what_would_be_right() {
        for (text, words) in [
            ("cluster_size=1000", "cluster_size=1000: expected a power of two from 512 to 2M"),
            ("refcount_bits=12", "refcount_bits=12: expected a power of two from 1 to 64"),
            ("compat=1.2", "compat=1.2: expected 0.10 or 1.1"),
            ("lazy_refcounts=perhaps", "lazy_refcounts=perhaps: expected on or off"),
            ("preallocation=some", "preallocation=some: expected off, metadata, falloc or full"),
            ("compression_type=lzma", "compression_type=lzma: expected zlib or zstd"),
            ("clustersize=4k", "unknown option 'clustersize'"),
            ("compat", "not 'compat'"),
            ("", "not ''"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
