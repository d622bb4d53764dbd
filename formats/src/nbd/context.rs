//! Metadata contexts: what BLOCK_STATUS can tell of a disk's bytes.
//!
//! ```text
//! base:allocation             hole, zero (the protocol's own)
//! qemu:allocation-depth       number of the layer that has it, 1 being the top; 0: none has
//! qemu:dirty-bitmap:NAME      1 where the bitmap is set
//! ```
//!
//! A context's number is its place in the export's whole list, counted from one, so that it is the same on
//! every connection.
use super::export::ExportInfo;

/// Contexts that an export can have: the further bitmaps are left out.
pub const CONTEXTS_MAX: usize = 32;

const BITMAPS: &str = "qemu:dirty-bitmap:";

/// One kind of answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Context {
    /// What is a hole, what zero.
    Allocation,
    /// Which layer has it.
    Depth,
    /// What a bitmap has set; its name.
    Bitmap(String),
}

impl Context {
    /// Its name on the wire.
    pub fn name(&self) -> String {
        match self {
            Self::Allocation => "base:allocation".into(),
            Self::Depth => "qemu:allocation-depth".into(),
            Self::Bitmap(name) => format!("{BITMAPS}{name}"),
        }
    }

    /// The one of this name; `None` where there is none.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "base:allocation" => Some(Self::Allocation),
            "qemu:allocation-depth" => Some(Self::Depth),
            _ => name.strip_prefix(BITMAPS).map(|bitmap| Self::Bitmap(bitmap.to_owned())),
        }
    }
}

/// The contexts of an export, each with its number.
pub fn all(export: &ExportInfo) -> impl Iterator<Item = (u32, Context)> {
    let bitmaps = export.bitmaps.iter().cloned().map(Context::Bitmap);
    let contexts = [Context::Allocation, Context::Depth].into_iter().chain(bitmaps);
    (1..).zip(contexts.take(CONTEXTS_MAX))
}

/// Those that LIST_META_CONTEXT's queries ask for, by their names or by what these begin with up to a colon;
/// without a query, all.
pub fn listed(export: &ExportInfo, queries: &[&str]) -> Vec<(u32, Context)> {
    let asked = |name: &str| {
        let by = |query: &&str| name == *query || (query.ends_with(':') && name.starts_with(query));
        queries.is_empty() || queries.iter().any(by)
    };
    all(export).filter(|(_, context)| asked(&context.name())).collect()
}

/// Those that SET_META_CONTEXT's queries choose, each once, however often it is asked for.
pub fn chosen(export: &ExportInfo, queries: &[&str]) -> Vec<(u32, Context)> {
    all(export).filter(|(_, context)| queries.contains(&context.name().as_str())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::export::BlockSizes;

    fn export(bitmaps: usize) -> ExportInfo {
        let bitmaps = (0..bitmaps).map(|number| format!("b{number}")).collect();
        let block_sizes = BlockSizes::default();
        let (name, description) = ("vda".into(), String::new());
        let (size, read_only, multi_conn, fast_zero) = (1 << 20, false, true, true);
        ExportInfo { name, description, size, read_only, multi_conn, fast_zero, block_sizes, bitmaps }
    }

    fn names(contexts: &[(u32, Context)]) -> Vec<String> {
        contexts.iter().map(|(number, context)| format!("{number} {}", context.name())).collect()
    }

    #[test]
    fn a_query_finds_a_name_or_what_begins_with_it_up_to_a_colon() {
        let list = |queries: &[&str]| names(&listed(&export(1), queries));
        let (allocation, depth, bitmap) = ("1 base:allocation", "2 qemu:allocation-depth", "3 qemu:dirty-bitmap:b0");
        assert_eq!(list(&[]), [allocation, depth, bitmap]);
        assert_eq!(list(&["base:"]), [allocation]);
        assert_eq!(list(&["qemu:"]), [depth, bitmap]);
        assert_eq!(list(&["qemu:dirty-bitmap:", "base:allocation"]), [allocation, bitmap]);
        assert!(list(&["qemu:alloc", "other:", "", "base:allocation:"]).is_empty());
    }

    #[test]
    fn a_choice_is_by_whole_names_and_once_each() {
        let choose = |queries: &[&str]| names(&chosen(&export(1), queries));
        assert_eq!(choose(&["qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b0"]), ["3 qemu:dirty-bitmap:b0"]);
        assert!(choose(&["base:", "qemu:dirty-bitmap:b1"]).is_empty());
        assert_eq!(all(&export(100)).count(), CONTEXTS_MAX);
    }
}
