//! `NAME=FILE[,format=qcow2|raw][,readonly]`, as `serve --export` has it.
use engine::control::TargetFormat;
use engine::control::options::ExportOptions;
use std::path::PathBuf;

/// One export from one word. A comma in FILE is written twice, as in QEMU's options.
///
/// # Errors
/// What is wrong with the word and what would be right.
pub fn parse(word: &str) -> Result<ExportOptions, String> {
    let (name, rest) = word.split_once('=').ok_or("expected NAME=FILE[,format=qcow2|raw][,readonly]")?;
    let mut parts = split(rest).into_iter();
    let file = parts.next().unwrap_or_default();
    if name.is_empty() || file.is_empty() {
        return Err("expected NAME=FILE, neither of them empty".into());
    }
    let mut export = ExportOptions { name: name.into(), file: PathBuf::from(file), format: None, readonly: false };
    for option in parts {
        match option.as_str() {
            "readonly" => export.readonly = true,
            "format=qcow2" => export.format = Some(TargetFormat::Qcow2),
            "format=raw" => export.format = Some(TargetFormat::Raw),
            _ => {
                return Err(format!(
                    "unknown option '{option}': expected format=qcow2, format=raw or readonly \
                     (a comma in the file's name is written twice)"
                ));
            }
        }
    }
    Ok(export)
}

/// The parts between single commas; two commas are one of the part.
pub fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(letter) = rest.next() {
        if letter == ',' && rest.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(letter);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::parse;
    use engine::control::TargetFormat;
    use engine::control::options::ExportOptions;

    fn export(file: &str) -> ExportOptions {
        ExportOptions { name: "vda".into(), file: file.into(), format: None, readonly: false }
    }

    #[test]
    fn options_follow_the_file() {
        assert_eq!(parse("vda=/a.qcow2"), Ok(export("/a.qcow2")));
        let all = ExportOptions { format: Some(TargetFormat::Raw), readonly: true, ..export("/a=b") };
        assert_eq!(parse("vda=/a=b,readonly,format=raw"), Ok(all));
        let qcow2 = ExportOptions { format: Some(TargetFormat::Qcow2), ..export("/a") };
        assert_eq!(parse("vda=/a,format=qcow2"), Ok(qcow2));
    }

    #[test]
    fn two_commas_are_one_of_the_name() {
        assert_eq!(parse("vda=/a,,b"), Ok(export("/a,b")));
        assert_eq!(parse("vda=/a,,"), Ok(export("/a,")));
        let readonly = ExportOptions { readonly: true, ..export("/a,") };
        assert_eq!(parse("vda=/a,,,readonly"), Ok(readonly));
    }

    #[test]
    fn what_is_no_export_is_refused() {
        for word in ["", "vda", "=/a", "vda=", "vda=,readonly", "vda=/a,", "vda=/a,format=vmdk", "vda=/a,read-only"] {
            assert!(parse(word).is_err(), "{word}");
        }
    }
}
