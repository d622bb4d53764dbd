//! The verbs that change what a running daemon serves.
use super::job::ended;
use super::mirror::name;
use crate::args::{AddExport, Export, RemoveExport, Resize, Snapshot};
use crate::client::Client;
use crate::creation;
use crate::failure::Failure;
use crate::output::tell;
use crate::place::place;
use engine::control::SnapshotRequest;
use engine::control::options::ExportOptions;
use serde_json::{Value, json};

/// One more disk, or one less.
pub fn run(export: &Export) -> Result<(), Failure> {
    match export {
        Export::Add(add) => self::add(add),
        Export::Remove(remove) => self::remove(remove),
    }
}

fn add(add: &AddExport) -> Result<(), Failure> {
    let mut client = Client::connect(&add.daemon.control)?;
    let options = ExportOptions { file: place(&add.export.file)?, ..add.export.clone() };
    let _: Value = client.call_and_wait("blkmirror-export-add", &options)?;
    ended(&mut client, &options.name, "added", add.form)
}

fn remove(remove: &RemoveExport) -> Result<(), Failure> {
    let RemoveExport { export, force, .. } = remove;
    let mut client = Client::connect(&remove.daemon.control)?;
    let _: Value = client.call_and_wait("blkmirror-export-remove", &json!({ "export": export, "force": force }))?;
    tell(remove.form, &json!({ "export": export, "result": "removed" }), || format!("{export}: removed"))
}

/// A new overlay on top; returns when the guest is on it.
pub fn snapshot(snapshot: &Snapshot) -> Result<(), Failure> {
    let mut client = Client::connect(&snapshot.daemon.control)?;
    let request = SnapshotRequest {
        export: snapshot.export.clone(),
        file: name(&snapshot.file)?,
        reuse_external: snapshot.reuse_external,
        format: None,
        options: creation::all(&snapshot.options).map_err(Failure::new)?,
        relative_backing: snapshot.relative_backing,
    };
    let _: Value = client.call_and_wait("blkmirror-snapshot", &request)?;
    ended(&mut client, &snapshot.export, "snapshot taken", snapshot.form)
}

/// A larger disk; returns when it has that size.
pub fn resize(resize: &Resize) -> Result<(), Failure> {
    let Resize { export, size, .. } = resize;
    let mut client = Client::connect(&resize.daemon.control)?;
    let _: Value = client.call_and_wait("blkmirror-resize", &json!({ "export": export, "size": size }))?;
    ended(&mut client, export, "resized", resize.form)
}
