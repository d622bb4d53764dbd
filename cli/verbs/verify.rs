//! `verify`: whether a copy has what it was given: a mirror's target, read back while its guest writes, or an image, by its
//! manifest.
use crate::args::Verify;
use crate::client::Client;
use crate::failure::Failure;
use crate::image;
use crate::manifest::{self, Found};
use crate::output::tell;
use engine::disk::Disk;
use serde_json::{Value, json};
use std::path::Path;

/// Verifies an export's mirror or an image.
pub fn run(args: &Verify) -> Result<(), Failure> {
    match (&args.control, &args.manifest) {
        (Some(control), _) => mirror(control, args),
        (None, Some(manifest)) => by_manifest(manifest, args),
        (None, None) => unreachable!("one of the two is given"),
    }
}

fn mirror(control: &Path, args: &Verify) -> Result<(), Failure> {
    let export = args.what.to_str().ok_or_else(|| Failure::new("an export's name is UTF-8"))?;
    let mut client = Client::connect(control)?;
    let _: Value = client.call_and_wait("blkmirror-verify", &json!({ "export": export, "wait": args.wait }))?;
    let status = client.status(export)?;
    let [verified, mismatches] = [status.verified_bytes, status.mismatches].map(|number| number.unwrap_or(0));
    let result = if args.wait { "verified" } else { "verifying" };
    let object = json!({ "export": export, "result": result, "verified_bytes": verified, "mismatches": mismatches });
    tell(args.form, &object, || match args.wait {
        true => format!("{export}: {verified} bytes were read back, {mismatches} mismatches were found and mended"),
        false => format!("{export}: the target is being read back"),
    })
}

fn by_manifest(manifest: &Path, args: &Verify) -> Result<(), Failure> {
    let chain = image::open_chain(&args.what, args.format, &args.servers, args.sharing);
    let disk = Disk::new(chain.map_err(|error| Failure::new(error.one_line()))?, true);
    let (place, size) = (args.what.display(), disk.size());
    let (words, object) = match manifest::check(manifest, disk)? {
        Found::Same => {
            let words = format!("{place}: {size} bytes are as {} says", manifest.display());
            (words, json!({ "result": "same", "verified_bytes": size }))
        }
        Found::Differs { at, bytes } => {
            let words = format!("{place}: {bytes} bytes are in ranges that differ, the first of which begins at {at}");
            (words, json!({ "result": "content-differs", "offset": at, "bytes": bytes }))
        }
        Found::Size(found, said) => {
            let words = format!("{place}: it has {found} bytes, and {} says {said}", manifest.display());
            (words, json!({ "result": "sizes-differ", "sizes": [found, said] }))
        }
    };
    let is_same = object["result"] == "same";
    tell(args.form, &object, || words)?;
    if is_same { Ok(()) } else { Err(Failure::Told) }
}
