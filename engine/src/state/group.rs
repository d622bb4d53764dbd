//! The groups' record in the state folder, and what a crash left to it alone.
use super::{REMEDY, StateFolder, lock};
use crate::io::File;
use crate::pivot::{GroupFile, slots_of};
use formats::error::{Context, Result};
use formats::record::{GROUP_SLOT_LEN, Group, Record, SLOT_LEN};
use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

impl StateFolder {
    /// The record of groups; made, with two blank slots, where there is none.
    pub fn group(&self) -> Result<GroupFile> {
        let path = self.group_path();
        let named = |what: &str| format!("{}: {what}", path.display());
        let file = fs::File::options().create(true).truncate(false).read(true).write(true).open(&path);
        let mut file = file.context(|| named("open"))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).context(|| named("read"))?;
        if bytes.is_empty() {
            bytes.resize(2 * GROUP_SLOT_LEN, 0);
            file.write_all_at(&bytes, 0).context(|| named("write"))?;
            file.sync_all().context(|| named("flush"))?;
            self.sync()?;
        }
        lock(&path, &file)?;
        let newest = Group::newest(&bytes).map_err(|error| error.at(named(REMEDY)))?;
        Ok(GroupFile::new(File::new(file), path, newest))
    }

    /// Where the record of groups is.
    pub fn group_path(&self) -> PathBuf {
        self.folder.join("together.group")
    }

    /// Brings the members of a group into their exports' own records, where a crash came between. Says which.
    pub fn settle_group(&self) -> Result<Vec<Record>> {
        if !self.group_path().exists() {
            return Ok(Vec::new());
        }
        let mut brought = Vec::new();
        for member in &self.group()?.newest().members {
            let newest = self.record(&member.export)?.newest().map_or(0, |record| record.generation);
            if newest < member.generation {
                self.bring(member)?;
                brought.push(member.clone());
            }
        }
        Ok(brought)
    }

    /// First into the slot that does not count, then into the other: one is whole at every instant.
    fn bring(&self, member: &Record) -> Result<()> {
        let path = self.record_path(&member.export);
        let named = |what: &str| format!("{}: {what}", path.display());
        let free = self.record(&member.export)?.free_slot();
        let file = fs::File::options().write(true).open(&path).context(|| named("open"))?;
        for (slot, bytes) in [free, 1 - free].into_iter().zip(slots_of(member)?) {
            file.write_all_at(&bytes, (slot * SLOT_LEN) as u64).context(|| named("write"))?;
            file.sync_all().context(|| named("flush"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::StateFolder;
    use super::{GROUP_SLOT_LEN, Group, Record};
    use std::fs;

    /// A crash came when the group's record was whole, and before any member was in its own.
    #[test]
    fn what_a_group_recorded_is_brought_into_each_record_once() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let state = StateFolder::open(folder.path()).expect("a state folder");
        assert!(state.settle_group().expect("none").is_empty());
        let member = |export: &str, generation| Record {
            generation,
            export: export.into(),
            origin: "/old".into(),
            truth: "/new".into(),
            format: "raw".into(),
            size: 1 << 20,
        };
        let group = Group { generation: 1, members: vec![member("vda", 1), member("vdb", 5)] };
        let file = [group.encode().expect("room"), vec![0; GROUP_SLOT_LEN]].concat();
        fs::write(state.group_path(), file).expect("a file");
        let brought = state.settle_group().expect("whole");
        assert_eq!(brought.iter().map(|record| record.export.as_str()).collect::<Vec<_>>(), ["vda", "vdb"]);
        for export in ["vda", "vdb"] {
            let record = state.record(export).expect("a record");
            assert_eq!(record.newest().map(|record| record.truth.as_str()), Some("/new"), "{export}");
            let bytes = fs::read(state.record_path(export)).expect("it is there");
            assert!(bytes.chunks(bytes.len() / 2).all(|slot| matches!(Record::decode(slot), Ok(Some(_)))), "{export}");
        }
        assert!(state.settle_group().expect("whole").is_empty());
    }
}
