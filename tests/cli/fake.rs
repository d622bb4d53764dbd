//! A daemon that answers as a test tells it to, through the real QMP session.
use engine::control::qmp::{Call, Client};
use engine::control::{Event, Refusal, Reply, Request};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

/// The daemon; its socket goes with it.
pub struct Fake {
    _folder: TempDir,
    path: String,
    calls: Arc<Mutex<Vec<Call>>>,
}

type Calls = Arc<Mutex<Vec<Call>>>;

impl Fake {
    /// A daemon that answers each request with what `answer` says, and hangs up after `quit`.
    pub fn start(answer: impl Fn(&Request) -> Result<Reply, Refusal> + Send + Sync + 'static) -> Self {
        Self::with(move |stream, calls| {
            let _ = serve(stream, &calls, &answer);
        })
    }

    /// A socket where nobody greets: it is closed after the connection is made.
    pub fn silent() -> Self {
        Self::with(|stream, _| drop(stream))
    }

    /// A daemon that hangs up instead of answering.
    pub fn that_hangs_up() -> Self {
        Self::with(|mut stream, _| {
            let mut client = Client::new();
            while client.next_call().is_none() {
                if flush(&mut stream, &mut client).and_then(|()| receive(&mut stream, &mut client)).is_err() {
                    return;
                }
            }
        })
    }

    /// A daemon to which these things happen, each an hour after the one before, as soon as somebody listens; then
    /// it ends.
    pub fn to_which_happen(events: Vec<Event>) -> Self {
        Self::with(move |mut stream, _| {
            let mut client = Client::new();
            let _ = flush(&mut stream, &mut client)
                .and_then(|()| receive(&mut stream, &mut client))
                .map(|()| assert!(client.next_call().is_none(), "only the capabilities are negotiated"));
            for (event, hour) in events.iter().zip(1..) {
                client.event(event, Duration::from_secs(hour * 3600) + Duration::from_micros(42));
            }
            let _ = flush(&mut stream, &mut client);
        })
    }

    /// Path of its control socket.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// What it was asked so far.
    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    /// The requests among what it was asked so far.
    pub fn requests(&self) -> Vec<Request> {
        self.calls().into_iter().map(|call| call.request).collect()
    }

    fn with(talk: impl Fn(UnixStream, Calls) + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control").to_str().unwrap().to_string();
        let listener = UnixListener::bind(&path).unwrap();
        let calls = Calls::default();
        let told = calls.clone();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                talk(stream, told.clone());
            }
        });
        Self { _folder: folder, path, calls }
    }
}

fn serve(
    mut stream: UnixStream,
    calls: &Calls,
    answer: &impl Fn(&Request) -> Result<Reply, Refusal>,
) -> std::io::Result<()> {
    let mut client = Client::new();
    loop {
        while let Some(call) = client.next_call() {
            let result = answer(&call.request);
            client.answer(result);
            let is_over = call.request == Request::Quit;
            calls.lock().unwrap().push(call);
            if is_over {
                return flush(&mut stream, &mut client);
            }
        }
        flush(&mut stream, &mut client)?;
        receive(&mut stream, &mut client)?;
    }
}

fn receive(stream: &mut UnixStream, client: &mut Client) -> std::io::Result<()> {
    let mut bytes = [0; 4096];
    match stream.read(&mut bytes)? {
        0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
        len => {
            client.receive(&bytes[..len]);
            Ok(())
        }
    }
}

fn flush(stream: &mut UnixStream, client: &mut Client) -> std::io::Result<()> {
    stream.write_all(client.output())?;
    client.sent(client.output().len());
    Ok(())
}
