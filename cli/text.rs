//! What a status looks like to a person.
use crate::size;
use engine::control::Status;

/// One export's status, a line for each thing that there is to say.
pub fn lines(status: &Status) -> Vec<String> {
    let mut facts =
        vec![("export", status.export.clone()), ("phase", phase(status)), ("serving", status.serving.clone())];
    if let Some(job) = &status.job {
        facts.push(("job", job.clone()));
    }
    if let Some(target) = &status.target {
        facts.push(("source", status.source.clone()));
        facts.push(("target", target.clone()));
    }
    if status.phase != "none" {
        facts.push(("copied", copied(status)));
    }
    if status.is_active() {
        facts.push(("remaining", format!("{}{}", remaining(status), band(status).unwrap_or_default())));
        facts.push(("rate", rates(status)));
        facts.extend(lag(status).map(|lag| ("lag", lag)));
        facts.extend(latency(status).map(|latency| ("requests take", latency)));
        facts.extend(deadline(status).map(|deadline| ("deadline", deadline)));
        facts.extend(status.warning.clone().map(|warning| ("warning", warning)));
        facts.push(("speed", speed(status)));
        facts.extend(memory(status).map(|memory| ("memory", memory)));
        facts.extend((status.failed_bytes > 0).then(|| ("failed", failed(status))));
        facts.extend((status.late_bytes > 0).then(|| ("late", size::format(status.late_bytes))));
    }
    facts.extend(rollback(status).map(|rollback| ("rollback", rollback)));
    facts.extend(verified(status).map(|verified| ("verified", verified)));
    facts.extend(status.redundancy.filter(|_| status.phase != "none").map(|times| ("copies", copies(times))));
    facts.extend(status.notes.iter().map(|note| ("note", note.clone())));
    facts.extend(status.error.iter().map(|error| ("error", error.clone())));
    facts.into_iter().map(|(name, fact)| format!("{name:<9} {fact}")).collect()
}

/// Everybody's status, a line for each export below a line of headings.
pub fn table(all: &[Status]) -> Vec<String> {
    let headings = ["EXPORT", "PHASE", "COPIED", "LEFT", "SERVING"].map(String::from);
    let rows: Vec<_> = std::iter::once(headings).chain(all.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2), width(3)];
    let line = |[export, phase, copied, left, serving]: &[String; 5]| {
        let [a, b, c, d] = widths;
        format!("{export:<a$}  {phase:<b$}  {copied:>c$}  {left:>d$}  {serving}")
    };
    rows.iter().map(line).collect()
}

/// One export's status in one line.
pub fn line(status: &Status) -> String {
    let Status { export, serving, .. } = status;
    let error = status.error.as_ref().map(|error| format!(": {error}")).unwrap_or_default();
    if !status.is_active() {
        return format!("{export}  {}, serving {serving}{error}", phase(status));
    }
    format!("{export}  {}  {}  {} left{error}", phase(status), percent(status), remaining(status))
}

/// The phase, and whether the job rests in it.
pub fn phase(status: &Status) -> String {
    let rests = match status.back_off_ms {
        _ if status.paused => ", paused",
        Some(_) => ", backing off",
        None => "",
    };
    let verifies = if status.verifying && status.phase == "ready" { ", verifying" } else { "" };
    format!("{}{rests}{verifies}", status.phase)
}

/// What the job has of it, or may have.
fn memory(status: &Status) -> Option<String> {
    let [bitmap, tables, buffers] =
        [status.bitmap_memory_bytes?, status.tables_memory_bytes?, status.buffers_memory_bytes?].map(size::format);
    Some(format!("{bitmap} bitmaps, {tables} tables, {buffers} buffers at most"))
}

/// What is left, and for how long.
pub fn remaining(status: &Status) -> String {
    let left = size::format(status.remaining_bytes);
    match status.eta_s.filter(|_| is_before_ready(status)) {
        Some(eta_s) => format!("{left}, {}", duration(eta_s)),
        None => left,
    }
}

/// Between which times it may be ready, in brackets, where they differ.
pub fn band(status: &Status) -> Option<String> {
    let low = status.eta_low_s.filter(|_| is_before_ready(status) && status.eta_low_s != status.eta_high_s)?;
    Some(match status.eta_high_s {
        Some(high) => format!(" ({} to {})", duration(low), duration(high)),
        None => format!(" ({} or more)", duration(low)),
    })
}

/// How fast copiers and guests are, and what the guests wait for that.
pub fn rates(status: &Status) -> String {
    let rate = |bytes| format!("{}/s", size::format(bytes));
    let copied = rate(status.copy_rate_bytes_per_s);
    let [written, dirtied] = [status.guest_rate_bytes_per_s, status.dirty_rate_bytes_per_s].map(rate);
    let delay = status.guest_delay_us.filter(|delay| *delay > 0);
    let delay = delay.map(|delay| format!(", delayed by {delay} µs each")).unwrap_or_default();
    let slowdown = status.slowdown.filter(|times| *times > 1.0);
    let slowdown = slowdown.map(|times| format!(", made {times:.1} times as slow")).unwrap_or_default();
    format!("{copied} copied; guest writes {written}, dirties {dirtied}{delay}{slowdown}")
}

/// What guest requests take, with copies and without.
pub fn latency(status: &Status) -> Option<String> {
    let (now, alone) = (status.guest_p99_us?, status.guest_p99_alone_us?);
    Some(format!(
        "{:.1} ms (99 of 100 requests), {:.1} ms without the copy",
        now as f64 / 1000.0,
        alone as f64 / 1000.0
    ))
}

/// Until when it is to be ready.
pub fn deadline(status: &Status) -> Option<String> {
    status.deadline_s.map(|left| if left == 0 { "it is late".to_owned() } else { format!("in {}", duration(left)) })
}

/// How far the target is behind, once it follows.
pub fn lag(status: &Status) -> Option<String> {
    let (bytes, seconds) = (status.lag_bytes?, status.lag_s?);
    Some(format!("{}, {seconds:.1} s", size::format(bytes)))
}

/// What could not be copied, and when it is tried again.
fn failed(status: &Status) -> String {
    let again = status.back_off_ms.map(|rest| format!(", tried again every {:.1} s", rest as f64 / 1000.0));
    format!("{}{}", size::format(status.failed_bytes), again.unwrap_or_default())
}

/// Whether the guest can go back to the disk of before its pivot.
pub fn rollback(status: &Status) -> Option<String> {
    let behind = size::format(status.lag_bytes.unwrap_or(status.remaining_bytes));
    let possible = || format!("possible, behind by {behind}");
    status.rollback.then(|| if status.is_active() { possible() } else { "lost".to_owned() })
}

/// How much was read back from the target, and what was found.
pub fn verified(status: &Status) -> Option<String> {
    let (bytes, mismatches) = (size::format(status.verified_bytes?), status.mismatches?);
    let so_far = if status.verifying { " so far" } else { "" };
    Some(format!("{bytes}{so_far}, mismatches: {mismatches}"))
}

/// How often the disk's data was copied.
pub fn copies(times: f64) -> String {
    format!("{times:.2} of each byte")
}

/// How much is done, in percent: never all of it while something is left.
pub fn percent(status: &Status) -> String {
    let permille = permille(status);
    format!("{}.{} %", permille / 10, permille % 10)
}

/// The same as a number from 0 to 1000.
pub fn permille(status: &Status) -> u64 {
    let permille = match status.total_bytes {
        0 if is_before_ready(status) || matches!(status.phase.as_str(), "pivoting" | "failed") => 0,
        0 => 1000,
        total => (u128::from(status.copied_bytes.min(total)) * 1000 / u128::from(total)) as u64,
    };
    let is_partial = status.remaining_bytes > 0 || is_before_ready(status);
    if is_partial { permille.min(999) } else { permille }
}

fn is_before_ready(status: &Status) -> bool {
    matches!(status.phase.as_str(), "seeding" | "converging")
}

fn row(status: &Status) -> [String; 5] {
    let (copied, left) = match status.is_active() {
        true => (percent(status), size::format(status.remaining_bytes)),
        false => ("-".into(), "-".into()),
    };
    [status.export.clone(), phase(status), copied, left, status.serving.clone()]
}

fn copied(status: &Status) -> String {
    let [copied, total] = [status.copied_bytes, status.total_bytes].map(size::format);
    format!("{copied} of {total} ({})", percent(status))
}

fn speed(status: &Status) -> String {
    let mode = status.mode.and_then(|mode| serde_json::to_value(mode).ok());
    let mode = mode.as_ref().and_then(|mode| mode.as_str()).map(|mode| format!(", mode {mode}")).unwrap_or_default();
    match status.speed_bytes_per_s {
        0 => format!("no limit{mode}"),
        limit => format!("at most {}/s{mode}", size::format(limit)),
    }
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::{line, lines, percent, table};
    use engine::control::Status;

    fn status(phase: &str, copied_bytes: u64, remaining_bytes: u64) -> Status {
        let total_bytes = copied_bytes + remaining_bytes;
        let (export, serving) = ("vda".into(), "/old".into());
        Status { export, serving, phase: phase.into(), total_bytes, copied_bytes, remaining_bytes, ..Status::default() }
    }

    #[test]
    fn nothing_is_done_before_it_is() {
        assert_eq!(percent(&status("converging", 999_999_999, 1)), "99.9 %");
        assert_eq!(percent(&status("converging", 100, 0)), "99.9 %");
        assert_eq!(percent(&status("seeding", 0, 0)), "0.0 %");
        assert_eq!(percent(&status("ready", 100, 0)), "100.0 %");
        assert_eq!(percent(&status("pivoted", 0, 0)), "100.0 %");
        assert_eq!(percent(&status("failed", 0, 0)), "0.0 %");
        assert_eq!(percent(&status("ready", u64::MAX / 2, u64::MAX / 2)), "50.0 %");
    }

    #[test]
    fn a_job_that_failed_says_why() {
        let mut failed = status("failed", 1, 1);
        failed.error = Some("flush of target new.raw: Input/output error".into());
        assert_eq!(line(&failed), "vda  failed, serving /old: flush of target new.raw: Input/output error");
        assert!(lines(&failed).contains(&"error     flush of target new.raw: Input/output error".into()));
    }

    #[test]
    fn lines_are_aligned() {
        let mut running = status("converging", 3 << 20, 1 << 20);
        running.target = Some("/new".into());
        (running.eta_s, running.eta_low_s) = (Some(75), Some(70));
        (running.lag_bytes, running.lag_s, running.redundancy) = (Some(4096), Some(0.25), Some(1.034));
        (running.copy_rate_bytes_per_s, running.guest_delay_us) = (9 << 20, Some(12));
        let told = lines(&running);
        for line in [
            "copied    3.00 MiB of 4.00 MiB (75.0 %)",
            "remaining 1.00 MiB, 1 min 15 s (1 min 10 s or more)",
            "rate      9.00 MiB/s copied; guest writes 0 B/s, dirties 0 B/s, delayed by 12 µs each",
            "lag       4.00 KiB, 0.2 s",
            "copies    1.03 of each byte",
        ] {
            assert!(told.contains(&line.into()), "{line}: {told:?}");
        }
        running.bitmap_memory_bytes = Some(3 << 20);
        (running.tables_memory_bytes, running.buffers_memory_bytes) = (Some(32 << 20), Some(4 << 20));
        let memory = "memory    3.00 MiB bitmaps, 32.0 MiB tables, 4.00 MiB buffers at most";
        assert!(lines(&running).contains(&memory.into()), "{:?}", lines(&running));
        running.eta_high_s = Some(3600);
        assert!(lines(&running).contains(&"remaining 1.00 MiB, 1 min 15 s (1 min 10 s to 1 h 0 min)".into()));
        running.phase = "ready".into();
        (running.verified_bytes, running.mismatches, running.verifying) = (Some(1 << 20), Some(2), true);
        let told = lines(&running);
        assert!(told.contains(&"phase     ready, verifying".into()), "{told:?}");
        running.rollback = true;
        assert!(lines(&running).contains(&"rollback  possible, behind by 4.00 KiB".into()));
        assert!(told.contains(&"verified  1.00 MiB so far, mismatches: 2".into()), "{told:?}");
        assert!(lines(&running).contains(&"remaining 1.00 MiB".into()));
    }

    #[test]
    fn the_table_has_a_row_for_each_export() {
        let rows = table(&[status("none", 0, 0), status("converging", 3 << 20, 1 << 20)]);
        assert_eq!(
            rows,
            [
                "EXPORT  PHASE       COPIED      LEFT  SERVING",
                "vda     none             -         -  /old",
                "vda     converging  75.0 %  1.00 MiB  /old",
            ]
        );
    }
}
