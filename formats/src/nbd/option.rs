//! The data of the handshake's options: parsed whole, or not at all.
//!
//! A byte too few or too many makes the option invalid. No byte of an option's data is ever taken
//! for the next option: the option's header says where that one begins.
use super::wire::{Fields, STRING_LEN_MAX, info};

/// Why an option's data is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// ERR_INVALID, with a reason.
    Invalid(&'static str),
    /// ERR_TOO_BIG, with a reason.
    TooBig(&'static str),
}

/// What INFO and GO ask for.
#[derive(Debug, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// Of which export; empty for the default.
    pub name: &'a str,
    /// NAME was asked for.
    pub canonical_name: bool,
    /// DESCRIPTION was asked for.
    pub description: bool,
    /// BLOCK_SIZE was asked for.
    pub block_size: bool,
}

/// Data of INFO and GO: a name, then the numbers of the facts that are wished for.
pub fn info_request(data: &[u8]) -> Result<InfoRequest<'_>, Bad> {
    let mut fields = Fields(data);
    let name = string(&mut fields)?;
    let count = fields.u16().ok_or(Bad::Invalid("the number of information requests is missing"))?;
    if fields.0.len() != usize::from(count) * 2 {
        return Err(Bad::Invalid("the list of information requests is not as long as it says"));
    }
    let mut request = InfoRequest { name, canonical_name: false, description: false, block_size: false };
    while let Some(wish) = fields.u16() {
        match wish {
            info::NAME => request.canonical_name = true,
            info::DESCRIPTION => request.description = true,
            info::BLOCK_SIZE => request.block_size = true,
            // EXPORT comes unasked; what is unknown has to be ignored.
            _ => {}
        }
    }
    Ok(request)
}

/// What LIST_META_CONTEXT and SET_META_CONTEXT ask for.
#[derive(Debug, PartialEq, Eq)]
pub struct ContextRequest<'a> {
    /// Of which export; empty for the default.
    pub name: &'a str,
    /// Each begins with a namespace and a colon, or finds nothing.
    pub queries: Vec<&'a str>,
}

/// Data of the two meta context options: a name, then queries.
///
/// The list is at most a quarter as long as the data, each query being four bytes at least.
pub fn context_request(data: &[u8]) -> Result<ContextRequest<'_>, Bad> {
    let mut fields = Fields(data);
    let name = string(&mut fields)?;
    let count = fields.u32().ok_or(Bad::Invalid("the number of queries is missing"))?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(string(&mut fields)?);
    }
    match fields.0 {
        [] => Ok(ContextRequest { name, queries }),
        _ => Err(Bad::Invalid("there is more behind the last query")),
    }
}

/// An export's name as EXPORT_NAME gives it: all of the data.
pub fn export_name(data: &[u8]) -> Result<&str, Bad> {
    text(data)
}

/// A string behind its length.
fn string<'a>(fields: &mut Fields<'a>) -> Result<&'a str, Bad> {
    let len = fields.u32().ok_or(Bad::Invalid("a string's length is missing"))?;
    let bytes = fields.bytes(len as usize).ok_or(Bad::Invalid("a string ends past the option's data"))?;
    text(bytes)
}

fn text(bytes: &[u8]) -> Result<&str, Bad> {
    if bytes.len() > STRING_LEN_MAX {
        return Err(Bad::TooBig("a string is longer than 4096 bytes"));
    }
    std::str::from_utf8(bytes).map_err(|_| Bad::Invalid("a string is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str, rest: &[u8]) -> Vec<u8> {
        [&(name.len() as u32).to_be_bytes(), name.as_bytes(), rest].concat()
    }

    #[test]
    fn facts_are_asked_for_by_number_and_unknown_ones_ignored() {
        let data = named("vda", &[0, 4, 0, 3, 0xff, 0xff, 0, 2, 0, 3]);
        let want = InfoRequest { name: "vda", canonical_name: false, description: true, block_size: true };
        assert_eq!(info_request(&data), Ok(want));
    }

    #[test]
    fn every_cut_and_every_surplus_is_invalid() {
        let info = named("vda", &[0, 1, 0, 3]);
        let context = named("vda", &[&[0, 0, 0, 1], &named("base:allocation", &[])[..]].concat());
        for len in 0..info.len() {
            assert!(matches!(info_request(&info[..len]), Err(Bad::Invalid(_))), "INFO of {len} bytes");
        }
        for len in 0..context.len() {
            assert!(matches!(context_request(&context[..len]), Err(Bad::Invalid(_))), "context of {len} bytes");
        }
        assert!(info_request(&info).is_ok() && context_request(&context).is_ok());
        assert!(matches!(info_request(&[info, vec![0]].concat()), Err(Bad::Invalid(_))));
        assert!(matches!(context_request(&[context, vec![0]].concat()), Err(Bad::Invalid(_))));
    }

    #[test]
    fn strings_are_utf8_of_at_most_4096_bytes() {
        assert_eq!(export_name(&[b'x'; 4096]).map(str::len), Ok(4096));
        assert!(matches!(export_name(&[b'x'; 4097]), Err(Bad::TooBig(_))));
        assert!(matches!(export_name(&[0xff]), Err(Bad::Invalid(_))));
    }

    #[test]
    fn a_count_that_lies_costs_nothing() {
        assert!(matches!(context_request(&named("", &[0xff; 4])), Err(Bad::Invalid(_))));
    }
}
