//! What a snapshot request means for the overlay that becomes the top of its export's chain.
use super::creation::{Creation, Upon};
use super::{Found, Plan, full_path, invalid, named, refuse_own_layers, top_header, unsupported};
use crate::control::{Refusal, SnapshotRequest, TargetFormat};
use crate::disk::Disk;
use std::path::Path;

/// Checks a request against the disk that the overlay is to be upon; changes nothing.
pub fn plan_overlay(request: &SnapshotRequest, source: &Disk) -> Result<Plan, Refusal> {
    let layers = source.chain().layers();
    let path = full_path(Path::new(&request.file))?;
    if let Some(TargetFormat::Raw) = request.format {
        let why = "an overlay is a qcow2 image: raw has no backing; leave out the format";
        return Err(unsupported(format!("{}: {why}", path.display())));
    }
    let format = TargetFormat::Qcow2;
    refuse_own_layers(&path, Some(format), layers)?;
    let found = Found::look(&path)?;
    let creation = match request.reuse_external {
        true if !request.options.is_empty() || request.relative_backing => {
            return Err(invalid(format!(
                "{}: options are of an overlay that is made, and this is reused",
                path.display()
            )));
        }
        true => {
            found.reuse(&path, Some(format))?;
            None
        }
        false => {
            found.create(&path, Some(format), layers)?;
            let header = top_header(source)?;
            let upon = Upon { layer: &layers[0], relative: request.relative_backing };
            let made = Creation::plan(&request.options, format, &path, layers, header.as_ref(), Some(upon));
            Some(made.map_err(|refusal| named(&path, refusal))?)
        }
    };
    let (chunk_bits, notes) = (0, Vec::new());
    let plan = Plan {
        path,
        format,
        shallow: false,
        below: Some(layers.to_vec()),
        creation,
        found,
        remote: None,
        chunk_bits,
        notes,
    };
    if plan.creation.is_none() || found == Found::Device {
        plan.check_size(source)?;
    }
    Ok(plan)
}
