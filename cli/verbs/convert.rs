//! `convert`: copies a chain that nobody writes to.
use crate::args::Convert;
use crate::bar::Bar;
use crate::creation;
use crate::failure::Failure;
use crate::image;
use crate::manifest;
use crate::output::{remark, tell};
use crate::place::place;
use crate::size;
use engine::control::options::Reach;
use engine::daemon::{ConvertOptions, Converted, convert};
use engine::disk::Disk;
use formats::backing::Location;
use serde_json::json;
use std::time::Instant;

/// Copies the source to the target.
pub fn run(args: Convert) -> Result<(), Failure> {
    let target = place(&args.target)?;
    let options = ConvertOptions {
        source: Location::of_argument(&args.source).map_err(|error| Failure::new(error.one_line()))?,
        source_format: args.source_format,
        target,
        format: args.format,
        options: creation::all(&args.options).map_err(Failure::new)?,
        shallow: args.shallow,
        compress: args.compress,
        reuse_external: args.reuse_external,
        reflink: !args.no_reflink,
        reach: Reach {
            cache: args.cache,
            certificates: args.servers.client_certificates.clone(),
            beside: args.sharing.beside(),
        },
    };
    let begun = Instant::now();
    let bar = Bar::new("convert");
    let converted = convert(&options, |copied| bar.set(copied.bytes, copied.total));
    drop(bar);
    let Converted { notes, copied, format } = converted.map_err(|error| Failure::new(error.one_line()))?;
    if !args.form.json {
        notes.iter().for_each(remark);
    }
    let seconds = begun.elapsed().as_secs_f64();
    let rate = (copied.bytes as f64 / seconds.max(1e-6)) as u64;
    if let Some(path) = &args.manifest {
        let chain = image::open_chain(&args.target, Some(format), &args.servers, args.sharing);
        manifest::write(path, Disk::new(chain.map_err(|error| Failure::new(error.one_line()))?, true))?;
    }
    let object = json!({
        "target": args.target.display().to_string(),
        "copied_bytes": copied.bytes,
        "seconds": seconds,
        "bytes_per_s": rate,
        "notes": notes,
    });
    let (target, bytes, rate) = (args.target.display(), size::format(copied.bytes), size::format(rate));
    tell(args.form, &object, || format!("{target}: {bytes} in {seconds:.2} s, {rate}/s"))
}
