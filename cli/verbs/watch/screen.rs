//! The live view: keys in, pictures out, and the terminal as it was when it ends.
use super::model::Model;
use super::poll::{Poll, Wanted};
use super::view;
use crate::args::Watch;
use crate::client::Client;
use crate::failure::Failure;
use crate::output::colours_are_wanted;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers, poll, read};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a key is waited for before the daemon's news are looked at.
const EVERY: Duration = Duration::from_millis(100);

/// Shows how things stand until somebody has seen enough, or the daemon ends.
pub fn follow(client: Client, args: Watch) -> Result<(), Failure> {
    let ended = Arc::<AtomicBool>::default();
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&ended)).map_err(|error| failed(&error))?;
    }
    let place = args.daemon.control.display().to_string();
    let poll = Poll::start(client, args.export)?;
    let screen = ratatui::try_init();
    let shown = screen.map_err(|error| failed(&error)).and_then(|mut screen| show(&mut screen, &poll, &place, &ended));
    // Also where only half of it was changed.
    let restored = ratatui::try_restore().map_err(|error| failed(&error));
    shown.and(restored)
}

fn show(screen: &mut DefaultTerminal, poll: &Poll, place: &str, ended: &AtomicBool) -> Result<(), Failure> {
    let mut model = Model::default();
    let (begun, colours) = (Instant::now(), colours_are_wanted());
    while !ended.load(Ordering::Relaxed) {
        for look in poll.looks() {
            model.take(look?, begun.elapsed());
        }
        let mut cells = 0;
        screen.draw(|frame| cells = view::draw(frame, &model, place, colours)).map_err(|error| failed(&error))?;
        let export = model.chosen().map(|shown| shown.status.export.clone());
        poll.want(Wanted { export, cells });
        match key().map_err(|error| failed(&error))? {
            Some(Wish::End) => break,
            Some(Wish::Choose(by)) => model.choose(by),
            None => {}
        }
    }
    Ok(())
}

/// What a key means.
enum Wish {
    End,
    Choose(isize),
}

/// The next key, where one comes soon. Another size is drawn anew by itself.
fn key() -> io::Result<Option<Wish>> {
    if !poll(EVERY)? {
        return Ok(None);
    }
    let Event::Key(KeyEvent { code, modifiers, kind: KeyEventKind::Press, .. }) = read()? else { return Ok(None) };
    Ok(match (code, modifiers.contains(KeyModifiers::CONTROL)) {
        (KeyCode::Char('c'), true) | (KeyCode::Char('q') | KeyCode::Esc, _) => Some(Wish::End),
        (KeyCode::Down | KeyCode::Tab | KeyCode::Char('j'), _) => Some(Wish::Choose(1)),
        (KeyCode::Up | KeyCode::BackTab | KeyCode::Char('k'), _) => Some(Wish::Choose(-1)),
        _ => None,
    })
}

fn failed(error: &io::Error) -> Failure {
    Failure::new(format!("the terminal: {error}: pipe it through cat for plain lines"))
}
