//! kv-store: a distributed key-value store over HTTP, in one file. A main instance has every key. A follower has none
//! and relays to its main instance. A node has the keys of its shard, one of several.
//!
//! The modules, about in the order in which a request passes them:
//! - `settings` reads the environment. `connections` receives a client's bytes and sends the answers. `http` parses
//!   requests and renders answers. `service` answers a request here, or relays it.
//! - `records` holds keys and values in buckets. `table` says which shard owns which hashes. `node` holds a node's
//!   state and decides, by the rules R1 to R12. `replication` copies records. `membership` starts a node and changes
//!   the view.
//! - `peers` carries requests to other instances and serves theirs. `world` has the lock, the clock and the threads.
//!   `main` follows. `simulation` runs whole stores in one process, and `tests` has the other unit tests.
//!
//! Where to look:
//! - The text of an answer is decided in `Outcome::row`, with the contract's two vocabularies side by side. A relayed
//!   answer is passed on unchanged, or with the address of the node that gave it.
//! - Which node answers for a key is decided in `Node::place`, by the shard that owns it (`Table::shard_at`); and when
//!   a node that has started again answers, in `Node::take_up_table`.
//! - A key changes hands in `Node::adopt` (its former owner stops answering), `replication::pull_all` (the new owner
//!   gets it; `replication::get_key`, if it is asked for before) and `Node::note_received` (the new owner answers
//!   alone). `replication::replicate` takes a write to the other replicas.
//! - A client's socket is written in `Client::flush` and `Client::write_waiting` only. `peers` writes streams, on
//!   connections that it is handed.
//! - What closes a connection is listed at the head of `connections`, and what ends a stream at that of `peers`.
//!
//! Each connection is a coroutine of the library `may`, and so is each request from another instance that has to wait.
//! All coroutines share one worker thread (`configure_worker`), so none may block it or compute for long. Blocking work
//! runs on threads: two for each stream to another instance; one for each plain request, each name lookup, each meeting
//! of nodes with what it reconciles, and the pulls of each table; one to free records. The background thread parses
//! large bodies and answers long messages of nodes (`in_background`). One thread wakes sleepers, and one begins rounds
//! of meetings.
//!
//! "The contract" in comments is the section of this name in README.md: all that a client may see.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener};
use std::panic::catch_unwind;
use std::process::exit;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use may_minihttp::HttpServiceFactory;

use connections::{MAX_CONNECTIONS, OTHER_FILES, Server};
use http::{Request, member};
use membership::keep_in_touch;
use settings::{HELP, Role, SETTINGS, Settings};
use world::{BACKGROUND, Live, block_on, fail, keep_stderr, pause, repeat, say, wake_sleepers};

const VERSION: &str = env!("CARGO_PKG_VERSION");

// ---- Settings: what the environment says ----------------------------------------------------------------------------

mod settings {
    //! Reads the environment, and checks addresses.
    //!
    //! Each variable is read once. A malformed or contradictory one ends the program with a line on stderr.

    use std::net::{IpAddr, SocketAddr};
    use std::sync::LazyLock;

    use url::Url;

    use crate::world::fail;

    pub const HELP: &str = "\
kv-store: a distributed key-value store over HTTP

usage: kv-store [--help | --version | --health]
  --health  checks that the instance with this environment answers, and a node for keys; exit status 0 or 1

environment (an empty variable is an unset one):
  PORT                TCP port to listen on                        [the port of ADDRESS, else 8080]
  IP                  IPv4 or IPv6 address to bind                 [0.0.0.0]
  FORWARDING_ADDRESS  host:port of the main instance to relay to   [none: this is a main instance]
  MAINIP              the same, where FORWARDING_ADDRESS is unset
  ADDRESS             this node's own host:port, as others reach it   [none]
  VIEW                the nodes of the store, host:port,host:port,... [ADDRESS alone if that is set]
  REPL_FACTOR         how many nodes hold each shard, at least [1]
  SECRET              what the nodes of a store share: 1 to 200 visible ASCII characters [none]
";

    /// A follower has the address of its main instance, a node its own address.
    pub enum Role {
        Main,
        Follower(String),
        Node(String),
    }

    /// This node's own address. None for a main instance and for a follower.
    pub fn own() -> Option<&'static str> {
        if let Role::Node(own) = &SETTINGS.role { Some(own) } else { None }
    }

    pub struct Settings {
        pub listen: SocketAddr,
        pub role: Role,
        /// The first view, and the number of replicas of each shard in it. A main instance is a store of one node that
        /// no other one knows, and has an empty address.
        pub view: Vec<String>,
        pub factor: usize,
        pub secret: Option<String>,
    }

    /// The settings of this process. The first use ends the program if they are not valid.
    pub static SETTINGS: LazyLock<Settings> = LazyLock::new(|| Settings::read().unwrap_or_else(|line| fail(2, &line)));

    impl Settings {
        /// The error is a line for stderr: variable, value, what was expected.
        fn read() -> Result<Settings, String> {
            let get = |name: &str| {
                let value = std::env::var_os(name)?.to_string_lossy().into_owned();
                Some(value).filter(|value| !value.is_empty())
            };
            let address = |name: &str| match get(name) {
                Some(value) if port_of(&value).is_none() => {
                    Err(format!("{name}={value}: expected host:port, such as 10.10.0.2:8080 or main:8080"))
                }
                value => Ok(value.map(|value| value.to_ascii_lowercase())),
            };
            let own = address("ADDRESS")?;
            let main = address(if get("FORWARDING_ADDRESS").is_some() { "FORWARDING_ADDRESS" } else { "MAINIP" })?;
            let is_node = own.is_some() && main.is_none();
            let of_nodes = ["VIEW", "REPL_FACTOR", "SECRET"].into_iter().find(|name| get(name).is_some());
            if let Some(name) = of_nodes.filter(|_| !is_node) {
                let value = get(name).filter(|_| name != "SECRET").unwrap_or("...".into());
                return Err(format!("{name}={value}: expected ADDRESS, too, and no FORWARDING_ADDRESS or MAINIP"));
            }
            let view = match get("VIEW") {
                None => vec![own.clone().filter(|_| is_node).unwrap_or_default()],
                Some(text) => parse_view(text.split(','))
                    .map_err(|why| format!("VIEW={text}: expected host:port,host:port,..., but {why}"))?,
            };
            let factor = get("REPL_FACTOR").unwrap_or("1".into());
            let factor = parse_factor(&factor, view.len())
                .map_err(|expected| format!("REPL_FACTOR={factor}: expected {expected}"))?;
            let secret = get("SECRET");
            if secret.iter().any(|text| text.len() > 200 || !text.bytes().all(|byte| byte.is_ascii_graphic())) {
                return Err("SECRET=...: expected 1 to 200 visible ASCII characters (its value is not shown)".into());
            }
            let port = match get("PORT") {
                Some(port) => port_of(&format!("localhost:{port}"))
                    .ok_or_else(|| format!("PORT={port}: expected a number from 1 to 65535"))?,
                None => own.as_deref().and_then(port_of).unwrap_or(8080),
            };
            let ip = get("IP").unwrap_or("0.0.0.0".into());
            let ip: IpAddr = ip.parse().map_err(|_| format!("IP={ip}: expected an IPv4 or IPv6 address"))?;
            let role = main.map(Role::Follower).or(own.map(Role::Node)).unwrap_or(Role::Main);
            Ok(Settings { listen: SocketAddr::new(ip, port), role, view, factor, secret })
        }
    }

    /// Checks the addresses of a view and returns them in lower case (RFC 4343). The error is the end of a sentence
    /// that says what is wrong.
    pub fn parse_view<'a>(addresses: impl Iterator<Item = &'a str>) -> Result<Vec<String>, String> {
        let mut view = Vec::new();
        for text in addresses.take(1001).map(str::trim) {
            let address = text.to_ascii_lowercase();
            if port_of(&address).is_none() {
                return Err(format!("'{text}' is not host:port"));
            } else if view.contains(&address) {
                return Err(format!("{text} is given twice"));
            }
            view.push(address);
        }
        if (1..=1000).contains(&view.len()) { Ok(view) } else { Err("it must name 1 to 1000 nodes".into()) }
    }

    /// Reads a replication factor for a store of `nodes` nodes. The error says what was expected.
    pub fn parse_factor(text: &str, nodes: usize) -> Result<usize, String> {
        let factor = text.parse().ok().filter(|factor| (1..=nodes).contains(factor) && !text.starts_with('+'));
        factor.ok_or(format!("a whole number from 1 to {nodes}, the number of nodes"))
    }

    /// The port of `host:port`, where the host is a name, an IPv4 address, or an IPv6 address in brackets. None if a
    /// URL would spell the address in another way.
    pub fn port_of(text: &str) -> Option<u16> {
        let url = Url::parse(&format!("http://{text}")).ok()?;
        let (host, port) = (url.host_str()?, url.port_or_known_default().filter(|port| *port > 0)?);
        // The URL parser takes more characters, such as a quotation mark, than an answer may contain.
        let is_plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte));
        (is_plain && text.len() <= 300 && text.eq_ignore_ascii_case(&format!("{host}:{port}"))).then_some(port)
    }
}

// ---- Connections: where bytes come in and answers go out ------------------------------------------------------------

mod connections {
    //! Receives requests on clients' connections, and sends the answers.
    //!
    //! may_minihttp parses requests and sends answers once it has handled all that it has read. It cannot answer a
    //! request that it fails to parse, answer HEAD without a body, set headers at run time, answer while it waits for
    //! the next request's body, wait for a slow reader, or close. Therefore each connection keeps its answers in an
    //! *output* buffer of its own (`Client::write`) and gives the server empty answers. When the server sends these,
    //! `send` sends the output instead.
    //!
    //! The output is flushed when the server sends, when it exceeds `BATCH`, and before anything that may wait: a
    //! request to another instance, a body, a large value. A large value is not copied: `write_waiting` writes it
    //! directly from the record while the coroutine waits for the client. So a client that does not read holds a
    //! reference to the record, and no buffer.
    //!
    //! A connection is closed
    //! - after the answer to `Connection: close`, HTTP/1.0 or a PUT of more than `MAX_BODY` (`close_with`);
    //! - after a refusal, when a head does not parse or end (`Connection::drop`), contradicts itself, has no host, or
    //!   announces a body without a length, or a stream does not prove the secret (`refuse`);
    //! - when the client has closed its side, after all answers (`after_read`, `Connection::drop`);
    //! - without an answer, when a body ends before its length (`serve`), a stream ends or is one too many
    //!   (`serve_stream`), reading fails (`after_read`), or a coroutine panics;
    //! - when writing fails, or its client takes nothing of an answer for 10 s (`write_waiting`);
    //! - when its client, for 75 s, completes no head of a request, or sends nothing of a body that is being read
    //!   (`watch`);
    //! - at once, when there are too many connections (`new_service`).
    //!
    //! The two connections of a stream are handed to `peers` (`serve_stream`).
    //!
    //! All of this runs on the worker thread (`configure_worker`), so the state of connections needs no locks.

    use std::cell::{Cell, RefCell};
    use std::io::{self, BufRead, IoSlice, Read, Write};
    use std::mem::ManuallyDrop;
    use std::net::{Shutdown, TcpStream};
    use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, RawFd};
    use std::panic::catch_unwind;
    use std::rc::Rc;
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    use std::thread;
    use std::time::{Duration, Instant, SystemTime};

    use httpdate::HttpDate;
    use may::io::WaitIo;
    use may_minihttp::{BodyReader, HttpService, HttpServiceFactory, Request as Parsed, Response};
    use nix::errno::Errno;

    use crate::http::{Answer, CLOSE, MAX_BODY, MAX_HEAD, Outcome, Vocabulary, answer_unread, read_head};
    use crate::peers::{carry_answers, knows_secret, read_requests};
    use crate::service::{LARGE_BODY, VERBS, answer_or_defer, count_answer};
    use crate::world::pause;

    /// The output is flushed when it exceeds this size, in bytes. A larger value is not copied to it.
    const BATCH: usize = 32 << 10;
    /// The number of bytes to receive and answer before other coroutines must run.
    const TURN: usize = 128 << 10;
    /// The limit of all bodies over `LARGE_BODY` that are being read or answered, in bytes. Further ones are not read
    /// meanwhile. Smaller bodies are not counted: all connections together may hold 3.4 GiB of them.
    const MAX_BODIES: usize = 64 << 20;
    /// The number of bytes that the server may read before it has parsed another request. It reads ahead, so `MAX_HEAD`
    /// can be checked only once a head is complete.
    const MAX_READ: usize = 3 * MAX_HEAD;
    /// A client that takes nothing of an answer for this time is disconnected.
    pub const WRITE_LIMIT: Duration = Duration::from_secs(10);
    /// The idle timeout, in seconds. Load balancers have one of 60 s: if the server's were shorter, they would send
    /// requests on connections that are just being closed.
    const IDLE_LIMIT: u32 = 75;

    /// The number of open connections.
    pub static CONNECTIONS: AtomicU64 = AtomicU64::new(0);
    /// The limit of open connections. One may take three open files: its socket, a second descriptor while its
    /// coroutine waits for the client, and a third while it carries a stream. It takes two memory mappings, for its
    /// coroutine's stack, of the 65,530 that Linux allows a process; without one the server ends. Deferred requests
    /// take the rest (`MAX_HELD`).
    pub static MAX_CONNECTIONS: LazyLock<u64> = LazyLock::new(|| {
        let files = rlimit::increase_nofile_limit(u64::MAX).unwrap_or(1024);
        (files.saturating_sub(OTHER_FILES) / 3).min(28_000)
    });
    /// The number of open files that are reserved for everything but connections.
    pub const OTHER_FILES: u64 = 200;

    thread_local! {
        /// The clients, by the descriptors of their sockets. Only the worker thread has any.
        static CLIENTS: RefCell<Vec<Option<Rc<Client>>>> = const { RefCell::new(Vec::new()) };
        /// The total length of the large bodies that are being read or answered.
        static BODIES: Cell<usize> = const { Cell::new(0) };
        /// The `Date` of answers, which `watch` updates.
        static DATE: RefCell<String> = const { RefCell::new(String::new()) };
        /// The number of bytes received and answered since other coroutines last ran.
        static SERVED: Cell<usize> = const { Cell::new(0) };
    }

    /// The state of a connection that the service, the watch, and `recv` and `send` share.
    struct Client {
        fd: RawFd,
        phase: Cell<Phase>,
        /// The number of seconds since the last answer, or since bytes of a body arrived.
        idle: Cell<u32>,
        /// When the head of the current request was complete.
        asked: Cell<Instant>,
        /// The number of bytes read since the last request was parsed.
        head: Cell<usize>,
        /// Answers that are not sent yet.
        output: RefCell<Vec<u8>>,
    }

    #[derive(Clone, Copy, PartialEq)]
    enum Phase {
        /// The server reads the head of the next request.
        Head,
        /// As `Head`, after the client has closed its side. The server learns of it from its next read.
        LastHead,
        /// A request is being answered.
        Request,
        /// As `Request`, and its body did not arrive with its head: it is read from the socket.
        Body,
        /// Nothing more is answered: the connection is being closed, or carries a stream.
        Closing,
    }

    impl Client {
        /// The client whose socket has this descriptor. None for a descriptor of anything else.
        fn at(fd: RawFd) -> Option<Rc<Client>> {
            CLIENTS.try_with(|clients| clients.borrow().get(fd as usize).cloned().flatten()).ok().flatten()
        }

        /// The socket. The server owns it, and closes it after `Connection::drop` has removed the client from
        /// `CLIENTS`.
        fn socket(&self) -> ManuallyDrop<TcpStream> {
            // SAFETY: the descriptor is open. A client is used in calls by the server, which closes the socket only
            // after `Connection::drop`, and in the watch, which does not yield. ManuallyDrop never closes it.
            ManuallyDrop::new(unsafe { TcpStream::from_raw_fd(self.fd) })
        }

        fn is_closing(&self) -> bool {
            self.phase.get() == Phase::Closing
        }

        /// Closes the connection. The server closes the socket when its next read or write fails.
        fn close(&self, how: Shutdown) {
            self.phase.set(Phase::Closing);
            let _ = self.socket().shutdown(how);
        }

        fn serve(&self, parsed: Parsed) {
            let (mut request, framing) = match read_head(&parsed) {
                Ok(head) => head,
                Err(refusal) => return self.refuse(refusal, parsed.method() == "HEAD"),
            };
            if let Some(id) = request.stream_id() {
                return self.serve_stream(id, parsed);
            }
            let verb = VERBS.into_iter().find(|verb| *verb == request.verb).unwrap_or("other");
            if request.verb == "PUT" && framing.length > MAX_BODY {
                return self.close_with(answer_unread(request), verb, false);
            }
            let is_large = framing.length > LARGE_BODY && framing.length <= MAX_BODY;
            let _permit = is_large.then(|| self.wait_for_permit(framing.length));
            if is_large {
                // `MAX_BODIES` counts this length. Growing by doubling could take twice as much.
                request.body.reserve_exact(framing.length);
            }
            if framing.expects_continue && framing.length > 0 {
                // RFC 9110 section 10.1.1.
                self.output.borrow_mut().extend(b"HTTP/1.1 100 Continue\r\n\r\n");
            }
            if framing.length > 0 && !self.read_body(parsed.body(), framing.length, &mut request.body) {
                return self.close(Shutdown::Write);
            }
            let answer = answer_or_defer(request).unwrap_or_else(|work| {
                // The work may take long: send the answers to earlier requests.
                self.flush();
                work()
            });
            if framing.closing {
                return self.close_with(answer, verb, framing.is_head);
            }
            self.write(answer, verb, "", framing.is_head);
        }

        /// Carries one half of a stream for as long as that lives.
        fn serve_stream(&self, id: &str, parsed: Parsed) {
            let knows_secret = match knows_secret(&parsed, id) {
                Ok(knows) => knows,
                Err(refusal) => return self.refuse(refusal, false),
            };
            self.flush();
            self.phase.set(Phase::Closing);
            match parsed.method() {
                "GET" => drop(carry_answers(id, &self.socket(), knows_secret)),
                _ => read_requests(id, parsed.body(), &self.socket(), knows_secret),
            }
            self.close(Shutdown::Write);
        }

        /// Waits until `MAX_BODIES` allows another large body. The idle timeout does not apply meanwhile.
        fn wait_for_permit(&self, length: usize) -> Permit {
            self.flush();
            let mut time = Duration::from_millis(5);
            while BODIES.get() + length > MAX_BODIES {
                pause(time);
                // Many may wait, for long, and each check takes the worker's time.
                time = (2 * time).min(Duration::from_millis(250));
            }
            BODIES.set(BODIES.get() + length);
            Permit(length)
        }

        /// Reads a whole body, and keeps it unless it is over `MAX_BODY`. Returns false if the connection ended before:
        /// then the request counts as never made. Sends the answers to earlier requests before it waits (`recv`).
        fn read_body(&self, mut reader: BodyReader, length: usize, body: &mut Vec<u8>) -> bool {
            let mut taken = 0;
            while taken < length {
                self.idle.set(0);
                let Ok(arrived @ [_, ..]) = reader.fill_buf() else { return false };
                let count = arrived.len();
                if length <= MAX_BODY {
                    body.extend(arrived);
                }
                reader.consume(count);
                taken += count;
                take_turn(&self.socket(), count);
            }
            if self.phase.get() == Phase::Body {
                // epoll is edge-triggered, and reading the body has consumed the edge: the server would not notice a
                // request that arrived with the end of the body.
                self.phase.set(Phase::Request);
                signal_again(&self.socket());
            }
            true
        }

        /// Writes an answer to the output, or a large value to the socket. `connection` is its `Connection` header, or
        /// empty.
        fn write(&self, answer: Answer, verb: &str, connection: &str, is_head: bool) {
            count_answer(verb, answer.status, self.asked.get().elapsed());
            DATE.with_borrow(|date| answer.write_head(&mut self.output.borrow_mut(), date, connection));
            for piece in answer.pieces().into_iter().filter(|_| !is_head) {
                if piece.len() > BATCH {
                    self.flush();
                    self.write_waiting(piece);
                } else {
                    self.output.borrow_mut().extend(piece);
                }
            }
            if self.output.borrow().len() > BATCH {
                self.flush();
            }
            take_turn(&self.socket(), answer.length());
        }

        /// Sends the output, and waits until the client has taken it.
        fn flush(&self) {
            if self.output.borrow().is_empty() {
                return;
            }
            let mut output = self.output.take();
            // `write_vectored` calls `writev`. `write` would call `send`, which calls this function.
            let count = self.socket().write_vectored(&[IoSlice::new(&output)]).unwrap_or(0);
            if count < output.len() {
                self.write_waiting(&output[count..]);
            }
            output.clear();
            // Idle connections keep little memory.
            output.shrink_to(4 << 10);
            self.output.replace(output);
        }

        /// Writes to the socket while the coroutine waits for the client to read, for up to `WRITE_LIMIT` at a time.
        fn write_waiting(&self, bytes: &[u8]) {
            let stream = waiting_stream(&self.socket(), Some(WRITE_LIMIT));
            if stream.and_then(|mut stream| stream.write_all(bytes)).is_err() {
                self.close(Shutdown::Write);
            }
        }

        /// Refuses a request after which the connection cannot be used further.
        fn refuse(&self, refusal: Outcome, is_head: bool) {
            self.close_with(refusal.answer(Vocabulary::Form, "GET"), "other", is_head);
        }

        /// Sends a last answer and closes the connection.
        fn close_with(&self, answer: Answer, verb: &str, is_head: bool) {
            // Sends the FIN in one packet with the last bytes. So this side is the first to close, and has the
            // TIME_WAIT state of a minute (RFC 9293 section 3.6.1): a proxy that had it would run out of ports.
            set_option(&self.socket(), libc::IPPROTO_TCP, libc::TCP_CORK, 1);
            self.write(answer, verb, CLOSE, is_head);
            self.flush();
            self.close(Shutdown::Write);
            self.linger();
        }

        /// Discards what the client still sends, for up to 5 s. Closing a socket with unread input resets the
        /// connection, and the reset may reach the client before it has read its answer.
        fn linger(&self) {
            let Ok(mut stream) = waiting_stream(&self.socket(), Some(Duration::from_secs(1))) else { return };
            let (deadline, mut buffer) = (Instant::now() + Duration::from_secs(5), vec![0; BATCH]);
            while Instant::now() < deadline
                && let Ok(count @ 1..) = stream.read(&mut buffer)
            {
                take_turn(&self.socket(), count);
            }
        }

        /// Follows the result of a `recv` by the server, and returns what to tell the server instead.
        fn after_read(&self, count: isize) -> isize {
            match (self.phase.get(), count) {
                (Phase::Request | Phase::Body, _) => self.phase.set(Phase::Body),
                (Phase::Head, 0) => {
                    // If the server saw the end of input now, it would drop the requests that it has just read.
                    self.phase.set(Phase::LastHead);
                    signal_again(&self.socket());
                    return fail_with(libc::EAGAIN);
                }
                (Phase::Head | Phase::LastHead, 1..) => {
                    self.head.set(self.head.get() + count as usize);
                    if self.head.get() > MAX_READ {
                        return fail_with(libc::ECONNABORTED);
                    }
                }
                (_, -1) if Errno::last() != Errno::EAGAIN => self.phase.set(Phase::Closing),
                _ => {}
            }
            count
        }
    }

    /// A part of `BODIES`, which it gives back when dropped.
    struct Permit(usize);

    impl Drop for Permit {
        fn drop(&mut self) {
            BODIES.set(BODIES.get() - self.0);
        }
    }

    /// Updates the date, and closes the connections that exceed the idle timeout. Must run every second in a coroutine.
    pub fn watch() {
        DATE.set(HttpDate::from(SystemTime::now()).to_string());
        CLIENTS.with_borrow(|clients| {
            for client in clients.iter().flatten() {
                if matches!(client.phase.get(), Phase::Head | Phase::LastHead | Phase::Body) {
                    client.idle.set(client.idle.get() + 1);
                    if client.idle.get() > IDLE_LIMIT {
                        client.close(Shutdown::Both);
                    }
                }
            }
        });
    }

    // -- The service

    pub struct Server;

    /// The server's service for one connection, by the descriptor of its socket.
    pub struct Connection(RawFd);

    impl HttpServiceFactory for Server {
        type Service = Connection;

        /// The server calls this once for each connection. The descriptor `id` stays open until the service is dropped.
        fn new_service(&self, id: usize) -> Connection {
            let fd = id as RawFd;
            let (phase, idle, head, output) = (Cell::new(Phase::Head), Cell::new(0), Cell::new(0), RefCell::default());
            let client = Rc::new(Client { fd, phase, idle, asked: Cell::new(Instant::now()), head, output });
            let socket = client.socket();
            // Otherwise an answer in two writes waits 40 ms for the client's delayed acknowledgement.
            let _ = socket.set_nodelay(true);
            // The socket is reported as writable when fewer than `BATCH` bytes are unsent. By default a third of the
            // send buffer must be free, which may take a slow reader longer than `WRITE_LIMIT`.
            set_option(&socket, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, BATCH as libc::c_int);
            // The server's accept loop would spin if it ran out of descriptors.
            if CONNECTIONS.fetch_add(1, Relaxed) >= *MAX_CONNECTIONS {
                client.close(Shutdown::Both);
            }
            CLIENTS.with_borrow_mut(|clients| {
                clients.resize(clients.len().max(id + 1), None);
                clients[id] = Some(client);
            });
            Connection(fd)
        }
    }

    impl HttpService for Connection {
        fn call(&mut self, parsed: Parsed, _: &mut Response) -> io::Result<()> {
            if let Some(client) = Client::at(self.0).filter(|client| !client.is_closing()) {
                client.phase.set(Phase::Request);
                client.asked.set(Instant::now());
                client.head.set(0);
                client.serve(parsed);
                client.idle.set(0);
                if !client.is_closing() {
                    client.phase.set(Phase::Head);
                }
            }
            Ok(())
        }
    }

    /// The server drops the service when the connection has ended or a request does not parse. It sends nothing then,
    /// so the answers that are left, and a refusal, are sent here.
    impl Drop for Connection {
        fn drop(&mut self) {
            let Some(client) = Client::at(self.0) else { return };
            let head = client.head.get();
            match client.phase.get() {
                // A coroutine that panics cannot wait.
                _ if thread::panicking() || client.is_closing() => {}
                // The client has closed its side, and may still read. An empty line may follow its last request.
                Phase::LastHead if head <= "\r\n".len() => client.flush(),
                _ => client.refuse(if head > MAX_READ { Outcome::BadRequest } else { Outcome::Unparsed }, false),
            }
            CLIENTS.with_borrow_mut(|clients| clients[self.0 as usize] = None);
            CONNECTIONS.fetch_sub(1, Relaxed);
        }
    }

    // -- Functions of the C library, which all sockets of the standard library use, on any thread. They differ from the
    // originals only for the descriptors of this thread's clients. A coroutine calls them then, so they may wait.

    /// Replaces the C library's `recv`, with which the standard library, and so the server, reads from sockets. It
    /// delays the end of input until all requests before it are served, and ends a connection whose head does not end:
    /// the server would buffer it without limit. Of a body only the first read is seen here: once a coroutine had to
    /// wait, `may` reads with read(2).
    // SAFETY: the signature is that of recv(2). For a client's descriptor too, at most `size` bytes of `buffer` are
    // written, and each result is one that recv(2) may give for a socket.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn recv(fd: RawFd, buffer: *mut libc::c_void, size: usize, flags: libc::c_int) -> isize {
        let client = Client::at(fd);
        if let Some(client) = &client {
            match client.phase.get() {
                // The client may wait for earlier answers before it sends the rest of a body.
                Phase::Request | Phase::Body => client.flush(),
                // What still comes is read from another descriptor (`waiting_stream`). The server must not wait for it.
                Phase::Closing => return 0,
                Phase::Head | Phase::LastHead => {}
            }
        }
        // SAFETY: the same call as `recv` (recv(2)), with the caller's arguments.
        let count = unsafe { libc::recvfrom(fd, buffer, size, flags, std::ptr::null_mut(), std::ptr::null_mut()) };
        client.map_or(count, |client| client.after_read(count))
    }

    /// Replaces the C library's `send`. What the server sends to a client is empty answers: the output is sent instead.
    // SAFETY: the signature is that of send(2). For a client's descriptor `buffer` is not read, and each result is one
    // that send(2) may give for a socket.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn send(fd: RawFd, buffer: *const libc::c_void, size: usize, flags: libc::c_int) -> isize {
        match Client::at(fd) {
            // SAFETY: the same call as `send` (send(2)), with the caller's arguments.
            None => unsafe { libc::sendto(fd, buffer, size, flags, std::ptr::null(), 0) },
            Some(client) => {
                client.flush();
                if client.is_closing() { fail_with(libc::EPIPE) } else { size as isize }
            }
        }
    }

    fn fail_with(error: libc::c_int) -> isize {
        Errno::set_raw(error);
        -1
    }

    // -- Sockets

    /// A second descriptor of a socket, whose reads and writes suspend the coroutine, and not the worker thread.
    /// `limit` is for each of them. (This is not a stream in the sense of `peers`.)
    pub fn waiting_stream(socket: &TcpStream, limit: Option<Duration>) -> io::Result<may::net::TcpStream> {
        // `may::io::CoIo` closes the descriptor before it removes it from epoll, which then reports events to memory
        // that is freed.
        let fd = socket.try_clone()?.into_raw_fd();
        // `from_raw_fd` panics if the kernel has no room for the descriptor in epoll, and a panic in `recv` or `send`
        // would end the process.
        // SAFETY: the descriptor is new, and the stream becomes its only owner. On a panic it is closed.
        let stream = catch_unwind(|| unsafe { may::net::TcpStream::from_raw_fd(fd) });
        let stream = stream.map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        stream.set_read_timeout(limit)?;
        stream.set_write_timeout(limit)?;
        Ok(stream)
    }

    /// Counts bytes that were served, and lets other coroutines run after `TURN` of them. Yielding is not enough: the
    /// worker polls sockets only when no coroutine is ready, and among busy clients one always is. Waiting for a new
    /// epoll registration, which is signalled at once, puts this coroutine behind all others.
    pub fn take_turn(socket: &TcpStream, count: usize) {
        SERVED.set(SERVED.get() + count);
        if SERVED.get() > TURN {
            SERVED.set(0);
            if let Ok(stream) = waiting_stream(socket, None) {
                stream.wait_io();
            }
        }
    }

    /// Makes epoll signal the socket again if it has input or its end. Setting SO_RCVLOWAT does that.
    fn signal_again(socket: &TcpStream) {
        set_option(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, 1);
    }

    pub fn set_option(socket: &TcpStream, level: libc::c_int, name: libc::c_int, value: libc::c_int) {
        let (value, size) = (&value as *const libc::c_int, size_of::<libc::c_int>() as libc::socklen_t);
        // SAFETY: setsockopt reads an int, which outlives the call.
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.cast(), size) };
    }
}

// ---- Requests and answers: what a client asks for, and what it is told ----------------------------------------------

mod http {
    //! Parses requests and renders answers.
    //!
    //! `read_head` makes a `Request` of what the server has parsed, and `Request::route` finds the resource.
    //! `record_of` reads key and value of a PUT, and `causal_context` the context in a body.
    //!
    //! An `Outcome` (created, found, missing, a refusal) is independent of HTTP. `Outcome::answer` renders it in one of
    //! the contract's two vocabularies, which are the two columns of one table (`Outcome::row`).

    use std::borrow::Cow;
    use std::collections::BTreeMap;
    use std::io::Write;

    use attohttpc::StatusCode;
    use may_minihttp::Request as Parsed;
    use percent_encoding::percent_decode;
    use serde::{Deserialize, Serialize};
    use serde_json::value::RawValue;
    use serde_json::{Value, json};

    use crate::node::{Context, node_of};
    use crate::records::Record;
    use crate::service::answer_about;

    /// The limit of a value, in bytes: of the UTF-8 of a string, and of the JSON text of anything else.
    pub const MAX_VALUE: usize = 1 << 20;
    /// The limit of a body, in bytes. A larger one is not kept.
    pub const MAX_BODY: usize = 4 << 20;
    /// The limit of a request's head, in bytes.
    pub const MAX_HEAD: usize = 64 << 10;

    /// A whole request, as it also travels between instances. HEAD is a GET here: the connection leaves out the body.
    #[derive(Clone, Default, Serialize, Deserialize)]
    pub struct Request {
        pub verb: String,
        /// Path and query as they came, percent-encoded.
        pub target: String,
        pub content_type: String,
        /// The instances that have relayed this request (RFC 9110 section 7.6.3).
        pub via: String,
        pub origin: Origin,
        /// When a request from another instance began, in milliseconds by the clock of this one. None for a request of
        /// this instance's own client.
        #[serde(skip)]
        pub began: Option<i64>,
        #[serde(with = "serde_bytes")]
        pub body: Vec<u8>,
    }

    /// Who sent a request.
    #[derive(Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
    pub enum Origin {
        /// From a client, directly or through followers.
        #[default]
        Client,
        /// From a client by way of a node, which takes this one for the owner of the key. The number is the store's id:
        /// a node that has started again may be a store of its own.
        Node(u64),
        /// From a node itself: the body is an `Envelope`.
        Message,
    }

    /// What the head of a request tells its connection.
    #[derive(Default)]
    pub struct Framing {
        /// The length of the body, in bytes.
        pub length: usize,
        pub is_head: bool,
        /// The client wants the connection closed, or speaks HTTP/1.0.
        pub closing: bool,
        pub expects_continue: bool,
    }

    /// Reads the head of a request that the server has parsed; the body is still missing. An error means that the head
    /// contradicts itself or the end of the body is not known, so the connection must be closed.
    pub fn read_head(parsed: &Parsed) -> Result<(Request, Framing), Outcome> {
        let is_1_0 = parsed.version() == 0;
        let mut framing = Framing { is_head: parsed.method() == "HEAD", closing: is_1_0, ..Framing::default() };
        let verb = if framing.is_head { "GET" } else { parsed.method() }.into();
        let target = origin_form(parsed.path()).ok_or(Outcome::BadRequest)?.into();
        let mut request = Request { verb, target, ..Request::default() };
        let (mut hosts, mut lengths, mut size, mut is_sound) = (0, 0, parsed.path().len(), true);
        for header in parsed.headers() {
            let is = |name: &str| header.name.eq_ignore_ascii_case(name);
            let text = str::from_utf8(header.value).unwrap_or_default();
            size += header.name.len() + header.value.len();
            if is("Transfer-Encoding") {
                return Err(Outcome::LengthRequired);
            } else if is("Host") {
                hosts += 1;
                is_sound &= is_host(header.value);
            } else if is("Content-Length") {
                // Digits only (RFC 9110 section 8.6), where `parse` takes a sign. Repeated lengths must agree.
                let length = text.parse().ok().filter(|_| !text.starts_with('+'));
                is_sound &= length.is_some() && (lengths == 0 || length == Some(framing.length));
                framing.length = length.unwrap_or(0);
                lengths += 1;
            } else if is("Connection") {
                framing.closing |= text.split(',').any(|option| option.trim().eq_ignore_ascii_case("close"));
            } else if is("Expect") {
                framing.expects_continue = !is_1_0 && text.eq_ignore_ascii_case("100-continue");
            } else if is("Content-Type") {
                request.content_type = text.into();
            } else if is("Via") {
                request.via += if request.via.is_empty() { "" } else { ", " };
                request.via += text;
            }
        }
        // One host, or none in HTTP/1.0 (RFC 9112 section 3.2).
        is_sound &= size <= MAX_HEAD && (hosts == 1 || hosts == 0 && is_1_0);
        if is_sound { Ok((request, framing)) } else { Err(Outcome::BadRequest) }
    }

    /// The path and query of a target. In absolute form, scheme and host precede them (RFC 9112 section 3.2.2). None if
    /// that host is not valid. Any other target that does not begin with a slash (OPTIONS *, CONNECT host:port) is a
    /// path that does not exist, and so is an absolute form without a path.
    fn origin_form(target: &str) -> Option<&str> {
        let Some(rest) = target.strip_prefix("http://") else { return Some(target) };
        let (host, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        (!host.is_empty() && is_host(host.as_bytes())).then_some(path)
    }

    /// Whether this is a valid host, with or without a port (RFC 3986 section 3.2.2). It may be empty.
    fn is_host(text: &[u8]) -> bool {
        // The colons inside an IPv6 address precede its closing bracket.
        let colon = text.iter().rposition(|byte| b":]".contains(byte)).filter(|at| text[*at] == b':');
        let (name, port) = text.split_at(colon.unwrap_or(text.len()));
        let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=%[:]".contains(byte);
        name.iter().all(is_plain) && port.iter().skip(1).all(u8::is_ascii_digit)
    }

    #[derive(Clone, Copy)]
    pub enum Vocabulary {
        Form,
        Json,
    }

    /// What a path identifies.
    pub enum Resource {
        Instance,
        Metrics,
        KeyCount,
        ViewChange,
        /// All shards, or the one with this id.
        Shards(Option<String>),
        Key(Vec<u8>),
        Unknown,
    }

    impl Request {
        /// What the request is about, and the vocabulary of its answer.
        pub fn route(&self) -> (Resource, Vocabulary) {
            let json = Vocabulary::Json;
            let typed = if self.is_of_type("application/json") { json } else { Vocabulary::Form };
            // A slash inside a key arrives as %2F.
            let key = |segment: &str| Resource::Key(percent_decode(segment.as_bytes()).collect());
            let path = self.target.split_once('?').map_or(&*self.target, |(path, _)| path);
            let below = path.strip_prefix("/kv-store/");
            match (path, below, below.and_then(|below| below.split_once('/'))) {
                ("/metrics", ..) => (Resource::Metrics, typed),
                ("/kv-store" | "/kv-store/", ..) => (Resource::Instance, json),
                ("/kv-store/key-count", ..) => (Resource::KeyCount, json),
                ("/kv-store/view-change", ..) => (Resource::ViewChange, json),
                ("/kv-store/shards", ..) => (Resource::Shards(None), json),
                (.., Some(("shards", id))) if !id.contains('/') => (Resource::Shards(Some(id.into())), json),
                (.., Some(("keys", segment))) if !segment.contains('/') => (key(segment), json),
                (_, Some(segment), None) => (key(segment), typed),
                _ => (Resource::Unknown, typed),
            }
        }

        /// Whether the body is of this media type, whose parameters do not matter. An empty name stands for no type.
        fn is_of_type(&self, name: &str) -> bool {
            let media_type = self.content_type.split(';').next().unwrap_or_default();
            media_type.trim_end().eq_ignore_ascii_case(name)
        }
    }

    /// Whether a key may be stored. GET and DELETE take any key: an invalid one is reported as missing.
    fn is_valid_key(key: &[u8], vocabulary: Vocabulary) -> bool {
        let is_form_byte = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
        match vocabulary {
            Vocabulary::Form => (1..=200).contains(&key.len()) && key.iter().all(is_form_byte),
            Vocabulary::Json => std::str::from_utf8(key).is_ok_and(|key| (1..=50).contains(&key.chars().count())),
        }
    }

    /// The answer to a PUT whose body is over `MAX_BODY`.
    pub fn answer_unread(request: Request) -> Answer {
        let (resource, vocabulary) = request.route();
        let Resource::Key(key) = &resource else { return answer_about(request, resource, vocabulary) };
        let refusal = if is_valid_key(key, vocabulary) { Outcome::ValueTooLarge } else { Outcome::KeyInvalid };
        refusal.answer(vocabulary, &request.verb)
    }

    /// The record that a PUT stores, or its refusal. The checks run in the contract's order: key, value, size.
    pub fn record_of(key: &[u8], request: &Request, vocabulary: Vocabulary) -> Result<Record, Outcome> {
        if !is_valid_key(key, vocabulary) {
            return Err(Outcome::KeyInvalid);
        }
        let value = match vocabulary {
            Vocabulary::Form => json_of(&form_value(request)?)?,
            Vocabulary::Json => json_value(&request.body)?,
        };
        Ok(Record::new(key, &value))
    }

    /// The first field `val` of the body, or else of the query, decoded.
    fn form_value(request: &Request) -> Result<String, Outcome> {
        let query = || form_field(request.target.split_once('?')?.1.as_bytes());
        let is_form = request.is_of_type("") || request.is_of_type("application/x-www-form-urlencoded");
        let body = if is_form { form_field(&request.body) } else { None };
        let value = body.or_else(query).ok_or(Outcome::ValueMissing)?;
        String::from_utf8(value).map_err(|_| Outcome::ValueNotText)
    }

    /// The first field `val` of an application/x-www-form-urlencoded text, decoded. The `form_urlencoded` crate is of
    /// no use: it replaces bytes that are not UTF-8.
    fn form_field(text: &[u8]) -> Option<Vec<u8>> {
        // The value begins with its `=`, if there is one.
        let value_at = |field: &[u8]| field.iter().position(|byte| *byte == b'=').unwrap_or(field.len());
        let mut fields = text.split(|byte| *byte == b'&').map(|field| field.split_at(value_at(field)));
        let (_, value) = fields.find(|(name, _)| percent_decode(name).eq(*b"val"))?;
        let spaced: Vec<u8> = value.iter().skip(1).map(|byte| if *byte == b'+' { b' ' } else { *byte }).collect();
        Some(if spaced.contains(&b'%') { percent_decode(&spaced).collect() } else { spaced })
    }

    /// The JSON text of the member `value` of a JSON object. It is kept as it came, so that no digit changes; only a
    /// string is written again, in its shortest form. Nothing here recurses, however deeply the value is nested.
    fn json_value(body: &[u8]) -> Result<String, Outcome> {
        let not_text = |refusal| if is_value_broken(body) { Outcome::ValueNotText } else { refusal };
        match member(body, "value").map_err(not_text)?.unwrap_or("null") {
            "null" => Err(Outcome::ValueMissing),
            json if json.starts_with('"') => {
                json_of(&serde_json::from_str::<String>(json).map_err(|_| Outcome::ValueNotText)?)
            }
            json if !is_text(json) => Err(Outcome::ValueNotText),
            json if json.len() > MAX_VALUE => Err(Outcome::ValueTooLarge),
            json => Ok(json.to_owned()),
        }
    }

    /// Whether all strings in a JSON text are valid Unicode: an escape may be half of a surrogate pair (RFC 8259
    /// section 8.2). Only escapes can be wrong, so the parser reads the whole text as one string. What would end this
    /// string, or may not be in one, is replaced by a slash, since `\/` is an escape too.
    fn is_text(json: &str) -> bool {
        let as_string = || format!("\"{}\"", json.replace(['"', '\n', '\r', '\t'], "/"));
        !json.contains("\\u") || serde_json::from_str::<String>(&as_string()).is_ok()
    }

    /// Whether a body was refused because its value is a string that is not UTF-8: with its bytes replaced, it parses.
    fn is_value_broken(body: &[u8]) -> bool {
        let mended = String::from_utf8_lossy(body);
        let is_broken = |value: &str| value.starts_with('"') && value.contains('\u{fffd}');
        member(mended.as_bytes(), "value").is_ok_and(|value| value.is_some_and(is_broken))
    }

    /// A text as a JSON string. The limit applies to the text: escapes make up to six bytes of one.
    fn json_of(text: &str) -> Result<String, Outcome> {
        if text.len() > MAX_VALUE {
            return Err(Outcome::ValueTooLarge);
        }
        // Writing to a String cannot fail.
        Ok(serde_json::to_string(text).unwrap_or_default())
    }

    /// The JSON text of a member of a body that is a JSON object. None if there is no such member or no body. Of
    /// several members with the name, the last one counts.
    pub fn member<'a>(body: &'a [u8], name: &str) -> Result<Option<&'a str>, Outcome> {
        let body = if body.is_empty() { b"{}" } else { body };
        let members: BTreeMap<String, &RawValue> = serde_json::from_slice(body).map_err(|_| Outcome::BodyNotObject)?;
        Ok(members.get(name).map(|value| value.get()))
    }

    /// The causal context in the body of a request in the JSON vocabulary, as `with_context` writes it. None without
    /// one, and for a body that is no JSON object, which a GET may have. An error if it is not one of ours.
    pub fn causal_context(request: &Request, vocabulary: Vocabulary) -> Result<Option<Context>, Outcome> {
        // A quick check first: few requests have one, and a body may be large.
        let may_have_it = || str::from_utf8(&request.body).is_ok_and(|body| body.contains("causal-context"));
        let takes_it = matches!((vocabulary, &*request.verb), (Vocabulary::Json, "GET" | "PUT" | "DELETE"));
        if !takes_it || !may_have_it() {
            return Ok(None);
        }
        let Ok(Some(text)) = member(&request.body, "causal-context") else { return Ok(None) };
        let members: BTreeMap<&str, Vec<u8>> = serde_json::from_str(text).map_err(|_| Outcome::ContextInvalid)?;
        let context: Context = match (members.len(), members.get("bytes")) {
            (0, None) => Context::default(),
            (1, Some(bytes)) => postcard::from_bytes(bytes).map_err(|_| Outcome::ContextInvalid)?,
            _ => return Err(Outcome::ContextInvalid),
        };
        let is_ours = context.seen.iter().all(|(node, stamp)| *node == node_of(*stamp));
        if is_ours { Ok(Some(context)) } else { Err(Outcome::ContextInvalid) }
    }

    /// The result of a request, independent of HTTP and of the vocabulary.
    #[rustfmt::skip]
    pub enum Outcome {
        Created, Replaced, Found(Record), Deleted, Missing,
        KeyInvalid, ValueMissing, ValueTooLarge, ValueNotText, BodyNotObject,
        ContextInvalid, Unsatisfied,
        MainDown, NotFound, BadRequest, Unparsed, LengthRequired, AddressNotSet, ViewMissing, ChangeUnderWay, NotOwner,
        NotOfStore,
        /// With the verbs that the path takes.
        VerbNotAllowed(&'static str),
        NoShard,
        /// With an object whose members follow those of the row.
        KeyCount(Value), Instance(Value), Shard(Value), Shards(Value), ViewChanged(Value),
        /// With the text, without its last line break.
        Metrics(String),
        /// With the address of the node.
        NodeDown(String), HoldsKeys(String),
        /// With the reason.
        ViewInvalid(String),
    }

    impl Outcome {
        /// The answers of the contract: status and body in the form vocabulary and in the JSON vocabulary. For an error
        /// only the message is here: `answer` adds the rest. It replaces `%` by the outcome's text or value. An outcome
        /// that is the same in both vocabularies, or occurs in one only, has one entry for both.
        #[rustfmt::skip]
        fn row(&self) -> [(u16, &'static str); 2] {
            use Outcome::*;
            match self {
                Created   => [(201, r#"{"replaced":"False","msg":"New key created"}"#),
                              (201, r#"{"message":"Added successfully","replaced":false}"#)],
                Replaced  => [(200, r#"{"replaced":"True","msg":"Value of existing key replaced"}"#),
                              (200, r#"{"message":"Updated successfully","replaced":true}"#)],
                Found(_)  => [(200, r#"{"result":"Success","value":%}"#),
                              (200, r#"{"doesExist":true,"message":"Retrieved successfully","value":%}"#)],
                Deleted   => [(200, r#"{"result":"Success"}"#),
                              (200, r#"{"doesExist":true,"message":"Deleted successfully"}"#)],
                Missing   => [(404, "Key does not exist"); 2],
                KeyInvalid        => [(403, "Key not valid"),        (400, "Key is too long")],
                ValueMissing      => [(403, "No value provided"),    (400, "Value is missing")],
                ValueTooLarge     => [(403, "Object too large. Size limit is 1MB"), (413, "Value is too large")],
                ValueNotText      => [(403, "Value is not valid UTF-8"), (400, "Value is not valid UTF-8")],
                BodyNotObject     => [(400, "Body is not a JSON object"); 2],
                ContextInvalid    => [(400, "Causal context is not valid"); 2],
                Unsatisfied       => [(400, "Unable to satisfy request"); 2],
                MainDown          => [(501, "Server unavailable"),   (503, "Main instance is down")],
                NotFound          => [(404, "Not found"); 2],
                VerbNotAllowed(_) => [(405, "Method not allowed"); 2],
                BadRequest        => [(400, "Bad request"); 2],
                Unparsed          => [(400, "Bad request: not HTTP/1.1, or more than 16 headers"); 2],
                LengthRequired    => [(411, "Length required"); 2],
                KeyCount(_)       => [(200, r#"{"message":"Key count retrieved successfully",%}"#); 2],
                Shards(_)         => [(200, r#"{"message":"Shard membership retrieved successfully",%}"#); 2],
                Shard(_)          => [(200, r#"{"message":"Shard information retrieved successfully",%}"#); 2],
                NoShard           => [(404, "Shard does not exist"); 2],
                Instance(_)       => [(200, r#"{"result":"Success",%}"#); 2],
                Metrics(_)        => [(200, "%"); 2],
                AddressNotSet     => [(400, "ADDRESS is not set"); 2],
                NodeDown(_)       => [(501, "Server unavailable"),   (503, "Node % is down")],
                ViewMissing       => [(400, "View is missing"); 2],
                ViewInvalid(_)    => [(400, "View is not valid: %"); 2],
                ChangeUnderWay    => [(409, "Another view change is in progress"); 2],
                HoldsKeys(_)      => [(409, "Node % holds keys of another store"); 2],
                ViewChanged(_)    => [(200, r#"{"message":"View change successful",%}"#); 2],
                // Only between instances.
                NotOfStore        => [(403, "Not a node of this store"); 2],
                // This node may not answer for the key now.
                NotOwner          => [(421, "Not the owner"); 2],
            }
        }

        /// What replaces `%`, unless it is a value.
        fn text(&self) -> Cow<'_, str> {
            use Outcome::*;
            match self {
                KeyCount(object) | Instance(object) | Shard(object) | Shards(object) | ViewChanged(object) => {
                    let text = object.to_string();
                    text[1..text.len() - 1].to_owned().into()
                }
                Metrics(text) | NodeDown(text) | HoldsKeys(text) | ViewInvalid(text) => text.into(),
                _ => "".into(),
            }
        }

        /// Renders the outcome in a vocabulary.
        pub fn answer(self, vocabulary: Vocabulary, verb: &str) -> Answer {
            let (status, row) = self.row()[vocabulary as usize];
            let text = row.replace('%', &self.text());
            let flag = if let Outcome::Missing = self { r#""doesExist":false,"# } else { "" };
            let body = match vocabulary {
                _ if row.starts_with(['{', '%']) => text + "\n",
                Vocabulary::Form => format!("{{\"result\":\"Error\",\"msg\":\"{text}\"}}\n"),
                Vocabulary::Json => format!("{{{flag}\"error\":\"{text}\",\"message\":\"Error in {verb}\"}}\n"),
            };
            let (header, value) = match self {
                Outcome::Found(record) => (JSON.into(), row.find('%').map(|at| (at, record))),
                Outcome::VerbNotAllowed(verbs) => (format!("{JSON}\r\nAllow: {verbs}").into(), None),
                Outcome::Metrics(_) => (METRICS.into(), None),
                _ => (JSON.into(), None),
            };
            Answer { status, header, body: body.into_bytes(), value }
        }
    }

    // The headers of an answer, besides those that all answers have.
    const JSON: &str = "Content-Type: application/json";
    const METRICS: &str = "Content-Type: text/plain; version=0.0.4";
    pub const CLOSE: &str = "Connection: close\r\n";

    /// An answer: the part of it that a relay passes on.
    #[derive(Clone, Serialize, Deserialize)]
    pub struct Answer {
        pub status: u16,
        /// `Content-Type`, and `Allow` if there is one, without the last line break.
        pub header: Cow<'static, str>,
        #[serde(with = "serde_bytes")]
        pub body: Vec<u8>,
        /// A value that belongs at this offset of the body. It is not copied there.
        #[serde(skip)]
        pub value: Option<(usize, Record)>,
    }

    impl Answer {
        /// The parts of the whole body.
        pub fn pieces(&self) -> [&[u8]; 3] {
            let (at, value) = self.value.as_ref().map_or((0, &[][..]), |(at, record)| (*at, record.value()));
            let (before, after) = self.body.split_at(at);
            [before, value, after]
        }

        /// Copies the value into the body, for another instance.
        pub fn joined(self) -> Answer {
            if self.value.is_some() { Answer { body: self.pieces().concat(), value: None, ..self } } else { self }
        }

        /// Writes the head of the answer. `connection` is a `Connection` header, or empty.
        pub fn write_head(&self, out: &mut Vec<u8>, date: &str, connection: &str) {
            let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::BAD_GATEWAY);
            let (reason, length) = (status.canonical_reason().unwrap_or("Unknown"), self.length().to_string());
            let line = ["HTTP/1.1 ", status.as_str(), " ", reason, "\r\nServer: M\r\nDate: ", date];
            let headers = ["\r\nContent-Length: ", &length, "\r\n", &self.header, "\r\n", connection, "\r\n"];
            line.into_iter().chain(headers).for_each(|text| out.extend(text.as_bytes()));
        }

        /// The length of the whole body, in bytes.
        pub fn length(&self) -> usize {
            self.pieces().into_iter().map(<[u8]>::len).sum()
        }

        /// A message between nodes, which never becomes HTTP.
        pub fn message(content: &impl Serialize) -> Answer {
            // Writing to a Vec cannot fail.
            let body = postcard::to_stdvec(content).unwrap_or_default();
            Answer { status: 200, header: "".into(), body, value: None }
        }

        /// Adds the address of the node that answered, in the JSON vocabulary.
        pub fn with_address(self, node: &str, vocabulary: Vocabulary) -> Answer {
            match vocabulary {
                Vocabulary::Json => self.with_member("address", &json!(node)),
                Vocabulary::Form => self,
            }
        }

        /// Adds the causal context if the request had one. It is a list of bytes: stamps exceed the integers that all
        /// JSON parsers keep exact.
        pub fn with_context(self, context: &Option<Context>) -> Answer {
            let Some(context) = context else { return self };
            // Writing to a Vec cannot fail.
            let bytes = || postcard::to_stdvec(context).unwrap_or_default();
            let context = if context.is_empty() { json!({}) } else { json!({"bytes": bytes()}) };
            self.with_member("causal-context", &context)
        }

        fn with_member(mut self, name: &str, value: &Value) -> Answer {
            if self.body.ends_with(b"}\n") {
                self.body.truncate(self.body.len() - 2);
                let _ = writeln!(self.body, ",\"{name}\":{value}}}");
            }
            self
        }
    }
}

// ---- Service: who answers a request ---------------------------------------------------------------------------------

mod service {
    //! Decides who answers a request, and answers what this instance can. `answer_or_defer` is the entry: what may wait
    //! is returned as work. A request for a key is a `KeyRequest`: `perform` tries it once under the node's lock, and
    //! `answer` does what is missing (relay it, get the key, replicate the write) and tries again. `answer_about`
    //! answers requests about no key. The rules about keys are in `node`, the texts of answers in `http`.

    use std::collections::BTreeMap;
    use std::fs;
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    use std::time::Duration;

    use serde_json::{Value, json};

    use crate::VERSION;
    use crate::connections::CONNECTIONS;
    use crate::http::{Answer, Origin, Outcome, Request, Resource, Vocabulary, causal_context, member, record_of};
    use crate::membership::{answer_view_change, count_keys, describe_shards, meet, meet_all};
    use crate::node::{Context, Node, Place};
    use crate::peers::{PATIENCE, relay};
    use crate::records::{MAX_KEY, Record, hash_of};
    use crate::replication::{World, get_key, replicate};
    use crate::settings::{Role, SETTINGS, own, parse_factor, parse_view};
    use crate::table::Version;
    use crate::world::{CHANGE_LIMIT, Live, START, answer_message, block_on, in_background};

    pub type Work = Box<dyn FnOnce() -> Answer + Send>;

    /// Answers at once if this instance can do so without waiting. Otherwise returns the work that remains.
    pub fn answer_or_defer(request: Request) -> Result<Answer, Work> {
        if request.origin == Origin::Message {
            return answer_message(&request);
        }
        let (resource, vocabulary) = request.route();
        if let Some(refusal) = request.refusal_if_late() {
            return Ok(refusal.answer(vocabulary, &request.verb));
        }
        match (&SETTINGS.role, resource) {
            (Role::Follower(main), resource) if !matches!(resource, Resource::Instance | Resource::Metrics) => {
                let patience = if let Resource::ViewChange = resource { CHANGE_LIMIT } else { request.patience() };
                Err(Box::new(move || {
                    let verb = request.verb.clone();
                    let down = |_| Outcome::MainDown.answer(vocabulary, &verb);
                    relay(main, request, patience).unwrap_or_else(down)
                }))
            }
            (_, Resource::Key(key)) if request.body.len() > LARGE_BODY => {
                Err(Box::new(move || in_background(move || answer_key(request, key, vocabulary))))
            }
            (_, Resource::Key(key)) => answer_key(request, key, vocabulary),
            (_, resource) => Err(Box::new(move || answer_about(request, resource, vocabulary))),
        }
    }

    /// Bodies above this size, in bytes, are parsed in the background: 4 MiB of JSON escapes take 30 ms.
    pub const LARGE_BODY: usize = 128 << 10;

    fn answer_key(request: Request, key: Vec<u8>, vocabulary: Vocabulary) -> Result<Answer, Work> {
        let mut request = KeyRequest::new(request, key, vocabulary);
        match Live.with(|node| request.perform(node)) {
            Tried::Done(outcome) => Ok(request.render(outcome)),
            tried => Err(Box::new(move || block_on(request.answer(&Live, tried)))),
        }
    }

    /// A request for a key.
    pub struct KeyRequest {
        hash: u64,
        key: Vec<u8>,
        request: Request,
        vocabulary: Vocabulary,
        /// The record to write, which is a tombstone for DELETE, or None for GET; or the refusal.
        action: Result<Option<Record>, Outcome>,
        /// The client's causal context; once the request is performed, that of the answer.
        context: Option<Context>,
        given: Vec<Given>,
        /// The nodes that did not answer the request.
        failed: Vec<String>,
        gave_up_on_context: bool,
    }

    /// The table by which a group gave the key, that group, and whether for the context (`Message::GiveKey`).
    type Given = (Version, Vec<String>, bool);

    /// Nodes that have a key. One of each group must give it.
    type Groups = Vec<Vec<String>>;

    /// The state after one try.
    pub enum Tried {
        Done(Outcome),
        /// Other replicas lack the record.
        Written(Record, Outcome),
        /// The key is at these nodes, in the order in which to ask them.
        Elsewhere(Vec<String>),
        /// R1: the key must be got first.
        Needs(Groups),
        /// R7: the same, for the context. None: the context names a newer table, which must be found first.
        NeedsForContext(Option<Groups>),
        /// This node may not use its table yet, or has none and knows of no other owner.
        Unknown,
    }

    impl KeyRequest {
        pub fn new(request: Request, key: Vec<u8>, vocabulary: Vocabulary) -> KeyRequest {
            let mut context = None;
            let action = causal_context(&request, vocabulary).and_then(|given| {
                context = given;
                match request.verb.as_str() {
                    // No stored key is this long.
                    "GET" | "DELETE" if key.len() > MAX_KEY => Err(Outcome::Missing),
                    "GET" => Ok(None),
                    "DELETE" => Ok(Some(Record::tombstone(&key))),
                    "PUT" => record_of(&key, &request, vocabulary).map(Some),
                    _ => Err(Outcome::VerbNotAllowed("GET, HEAD, PUT, DELETE")),
                }
            });
            let (hash, given, failed, gave_up_on_context) = (hash_of(&key), Vec::new(), Vec::new(), false);
            KeyRequest { hash, key, request, vocabulary, action, context, given, failed, gave_up_on_context }
        }

        pub fn perform(&mut self, node: &mut Node) -> Tried {
            if let Some(refusal) = self.request.refusal_if_late() {
                return Tried::Done(refusal);
            }
            match (node.place(self.hash), self.request.origin) {
                (Place::Here, Origin::Node(store)) if store == node.store() => {}
                // R1: a request is passed on once, so nodes with different tables cannot pass it in circles.
                (_, Origin::Node(_)) => return Tried::Done(Outcome::NotOwner),
                (Place::Here, _) => {}
                (Place::There(nodes), _) => return Tried::Elsewhere(nodes),
                (Place::Unknown, _) => return Tried::Unknown,
            }
            if let Some(context) = self.context.take() {
                if !node.is_plausible(&context) {
                    return Tried::Done(Outcome::ContextInvalid);
                }
                // Drops what is stable, so that a forged context with many members costs no more than a real one.
                self.context = Some(node.unstable_part(&context));
            }
            if self.action.is_err() {
                return self.perform_here(node);
            }
            let needs = self.not_given(node, node.pull_needs(self.hash), false);
            if !needs.is_empty() {
                return Tried::Needs(needs);
            }
            // Whether the answer depends on the value that is there.
            let reads = !matches!(&self.action, Ok(Some(record)) if !record.is_tombstone());
            if let Some(context) = self.context.as_ref().filter(|_| reads && !self.gave_up_on_context) {
                let Some(needs) = node.context_needs(self.hash, &self.key, context) else {
                    return Tried::NeedsForContext(None);
                };
                let needs = self.not_given(node, needs, true);
                if !needs.is_empty() {
                    return Tried::NeedsForContext(Some(needs));
                }
            }
            self.perform_here(node)
        }

        /// The groups of which none has given the key by the present table.
        fn not_given(&self, node: &Node, mut groups: Groups, for_context: bool) -> Groups {
            // What was given for a context will do for R1 too.
            let fits = |(version, _, flag): &&Given| Some(*version) == node.version() && (*flag || !for_context);
            let given: Vec<&Vec<String>> = self.given.iter().filter(fits).map(|(_, group, _)| group).collect();
            groups.retain(|group| !given.contains(&group));
            groups
        }

        fn perform_here(&mut self, node: &mut Node) -> Tried {
            let here = node.records.get(self.hash, &self.key).cloned();
            let found = here.clone().filter(|record| !record.is_tombstone());
            let known = self.context.clone().unwrap_or_default();
            let (record, outcome) = match std::mem::replace(&mut self.action, Ok(None)) {
                Err(outcome) => return Tried::Done(outcome),
                Ok(Some(record)) if !record.is_tombstone() => {
                    (record, if found.is_some() { Outcome::Replaced } else { Outcome::Created })
                }
                // The key may exist at a replica that could not be asked: write the tombstone anyway.
                Ok(Some(tombstone)) if found.is_some() || self.gave_up_on_context => (tombstone, Outcome::Deleted),
                Ok(_) => {
                    self.note_seen(node, here.as_ref());
                    return Tried::Done(found.map_or(Outcome::Missing, Outcome::Found));
                }
            };
            let record = node.write(self.hash, record, &known);
            let lacking = node.lacking(&record, &BTreeMap::new());
            if lacking.is_ok_and(|lacking| lacking.is_empty()) {
                self.note_seen(node, Some(&record));
                return Tried::Done(outcome);
            }
            Tried::Written(record, outcome)
        }

        /// Adds to the context that the client has seen a record, or that there is none.
        fn note_seen(&mut self, node: &mut Node, record: Option<&Record>) {
            if let Some(context) = &mut self.context {
                *context = node.context_after(context, record);
            }
        }

        fn render(&self, outcome: Outcome) -> Answer {
            outcome.answer(self.vocabulary, &self.request.verb).with_context(&self.context)
        }

        fn render_down(&self, node: &str) -> Answer {
            self.render(Outcome::NodeDown(node.to_owned())).with_address(node, self.vocabulary)
        }

        /// Continues after the first try until there is an answer.
        pub async fn answer(mut self, world: &impl World, mut tried: Tried) -> Answer {
            // The deadline counts from here, not from the arrival of the request: until now the connection may have
            // waited for a client that does not read earlier answers.
            let began = world.with(|node| node.now);
            let deadline = began + self.request.patience();
            let is_late = || world.with(|node| node.now) > deadline;
            loop {
                let may_go_on = match tried {
                    Tried::Done(outcome) => return self.render(outcome),
                    Tried::Written(record, outcome) => {
                        if let Err(missing) = replicate(world, &record, deadline).await {
                            return self.render_down(&missing);
                        }
                        world.with(|node| self.note_seen(node, Some(&record)));
                        return self.render(outcome);
                    }
                    Tried::Elsewhere(nodes) => match self.pass_on(world, &nodes, deadline).await {
                        Some(answer) => return answer,
                        None => false,
                    },
                    Tried::Needs(groups) if is_late() => return self.render_down(&groups[0][0]),
                    Tried::Needs(groups) => self.get(world, &groups, false).await,
                    Tried::NeedsForContext(groups) => self.get_for_context(world, groups, began).await,
                    Tried::Unknown if is_late() => return self.render_down(&world.with(|node| node.missing())),
                    Tried::Unknown => false,
                };
                if !may_go_on {
                    world.sleep(RETRY).await;
                }
                tried = world.with(|node| self.perform(node));
            }
        }

        /// Gets what the context requires. Returns whether it could. If not for `CATCH_UP`, the next try refuses a
        /// read, and performs a write. The last attempt may take 0.7 s more, or more than that in a view of more than
        /// 16 nodes if a newer table must be found.
        async fn get_for_context(&mut self, world: &impl World, groups: Option<Groups>, began: Duration) -> bool {
            let is_met = match groups {
                Some(groups) => self.get(world, &groups, true).await,
                None => self.catch_up(world).await,
            };
            let is_late = world.with(|node| node.now) > began + CATCH_UP;
            self.gave_up_on_context = !is_met && is_late;
            if self.gave_up_on_context && matches!(self.action, Ok(None)) {
                self.action = Err(Outcome::Unsatisfied);
            }
            is_met
        }

        /// Gets the key from a node of each group. Returns whether all groups gave it.
        async fn get(&mut self, world: &impl World, groups: &[Vec<String>], for_context: bool) -> bool {
            for group in groups {
                let Some(version) = get_key(world, &self.key, group, for_context).await else { return false };
                self.given.push((version, group.clone(), for_context));
            }
            true
        }

        /// R7: meets the view to find the newer table that the context names. If all answer and none uses it, it was
        /// never in force, and the context forgets it. Returns false while this is not known.
        async fn catch_up(&mut self, world: &impl World) -> bool {
            let nodes = world.with(|node| node.table()).map_or(Vec::new(), |table| table.view.clone());
            let all = meet_all(world, &nodes).await.iter().all(Option::is_some);
            let own = world.with(|node| node.version());
            let Some(context) = &mut self.context else { return true };
            if all && context.table > own {
                context.table = None;
            }
            context.table <= own
        }

        /// Relays the request to the first of these nodes that has not failed. None: try again, since this one does
        /// not answer for the key now, or failed without effect.
        async fn pass_on(&mut self, world: &impl World, nodes: &[String], deadline: Duration) -> Option<Answer> {
            let is_read = self.request.verb == "GET";
            let left: Vec<&String> = nodes.iter().filter(|node| !self.failed.contains(node)).collect();
            let Some(owner) = left.first() else { return Some(self.render_down(&nodes[0])) };
            let (store, now) = world.with(|node| (node.store(), node.now));
            if now >= deadline {
                return Some(self.render_down(owner));
            }
            let limit = if is_read && left.len() > 1 { NEXT_REPLICA } else { PATIENCE };
            let patience = deadline.saturating_sub(now).min(limit);
            let passed_on = Request { origin: Origin::Node(store), ..self.request.clone() };
            match world.relay(owner, passed_on, patience).await {
                Ok(answer) if answer.status == 421 => {
                    // The node with the older table adopts the newer one. A blank one only hears of it.
                    meet(world, owner).await;
                    None
                }
                Ok(answer) => Some(answer.with_address(owner, self.vocabulary)),
                Err(lost) => {
                    // A node that had too little time to answer is not silent.
                    if !lost.was_sent || patience >= NEXT_REPLICA {
                        world.with(|node| node.note_answer(owner, now, false));
                    }
                    self.failed.push((*owner).clone());
                    (!is_read && lost.was_sent).then(|| self.render_down(owner))
                }
            }
        }
    }

    /// How long a replica may take to answer a read before the next one is asked.
    const NEXT_REPLICA: Duration = Duration::from_millis(1200);
    /// The pause before another try. Each sends the body, or asks for the key, again.
    const RETRY: Duration = Duration::from_millis(10);
    /// How long a request retries what its context requires.
    const CATCH_UP: Duration = Duration::from_millis(250);

    /// Not inlined, which would cost every connection a page of its stack.
    #[inline(never)]
    pub fn answer_about(request: Request, resource: Resource, vocabulary: Vocabulary) -> Answer {
        use Outcome::*;
        let outcome = match (&resource, request.verb.as_str()) {
            (Resource::Instance, "GET") => Instance(describe_instance()),
            (Resource::Metrics, "GET") => Metrics(metrics()),
            (Resource::KeyCount, "GET") => block_on(count_keys(&Live)).unwrap_or_else(|failure| failure),
            (Resource::ViewChange, "PUT") | (Resource::Shards(_), "GET") if own().is_none() => AddressNotSet,
            (Resource::Shards(id), "GET") => {
                block_on(describe_shards(&Live, id.as_deref())).unwrap_or_else(|failure| failure)
            }
            (Resource::ViewChange, "PUT") => match wanted_view(&request.body) {
                Ok(wanted) => return block_on(answer_view_change(&Live, &request, &wanted)),
                Err(refusal) => refusal,
            },
            (Resource::Unknown, _) => NotFound,
            (Resource::ViewChange, _) => VerbNotAllowed("PUT"),
            _ => VerbNotAllowed("GET, HEAD"),
        };
        outcome.answer(vocabulary, &request.verb)
    }

    pub struct WantedView {
        pub view: Vec<String>,
        /// None: the factor stays as it is.
        pub factor: Option<usize>,
        pub force: bool,
    }

    pub fn wanted_view(body: &[u8]) -> Result<WantedView, Outcome> {
        // The reason quotes the client's text, without what would have to be escaped in JSON.
        let is_unfit = |letter: char| letter == '"' || letter == '\\' || letter.is_control();
        let invalid = |reason: String| Outcome::ViewInvalid(reason.replace(is_unfit, "'"));
        // This runs on the worker thread. 1,000 addresses of 300 bytes take less.
        if body.len() > 512 << 10 {
            return Err(invalid("it must name 1 to 1000 nodes".into()));
        }
        let view = member(body, "view")?.unwrap_or("null");
        let view = match (serde_json::from_str::<String>(view), serde_json::from_str::<Vec<String>>(view)) {
            _ if view == "null" => return Err(Outcome::ViewMissing),
            (Ok(text), _) => parse_view(text.split(',')),
            (_, Ok(nodes)) => parse_view(nodes.iter().map(String::as_str)),
            _ => Err("it is neither a string nor an array of strings".into()),
        };
        let view = view.map_err(invalid)?;
        let force = match member(body, "force")?.unwrap_or("null") {
            "true" => true,
            "false" | "null" => false,
            force => return Err(invalid(format!("force is {force}, neither true nor false"))),
        };
        let text = member(body, "repl-factor")?.unwrap_or("null");
        let factor = (text != "null").then(|| parse_factor(text, view.len())).transpose();
        let factor = factor.map_err(|expected| invalid(format!("repl-factor is {text}, not {expected}")))?;
        Ok(WantedView { view, factor, force })
    }

    fn describe_instance() -> Value {
        let (count, table, incoming, silent, is_in_force) =
            Live.with(|node| (node.sums().count, node.table(), node.incoming(), node.silent(), node.is_in_force()));
        match &SETTINGS.role {
            Role::Main => json!({"role": "main", "version": VERSION, "key-count": count}),
            Role::Follower(main) => json!({"role": "follower", "version": VERSION, "forwarding-address": main}),
            Role::Node(own) => {
                let view = table.as_ref().map_or(&SETTINGS.view, |table| &table.view);
                let mut it =
                    json!({"role": "node", "version": VERSION, "address": own, "view": view, "key-count": count});
                if let Some(shard) = table.as_ref().and_then(|table| table.shard_of(own)) {
                    it["shard-id"] = json!(id_of(shard));
                }
                if let Some(table) = &table {
                    it["repl-factor"] = json!(table.factor);
                    it["table-version"] = json!(table.version.to_string());
                }
                it["incoming"] = json!(Some(incoming).filter(|_| is_in_force));
                it["silent"] = json!(silent);
                it
            }
        }
    }

    pub fn id_of(shard: usize) -> String {
        (shard + 1).to_string()
    }

    pub const VERBS: [&str; 4] = ["GET", "PUT", "DELETE", "other"];
    /// The upper bounds of the histogram's buckets, in seconds. A bucket without a bound follows.
    const LIMITS: [f64; 6] = [0.0005, 0.001, 0.005, 0.025, 0.1, 1.0];

    /// Answers to clients for one verb: by first digit of the status, by bucket of the time taken, and the total time.
    #[derive(Default)]
    struct Answered {
        by_class: [AtomicU64; 6],
        by_time: [AtomicU64; LIMITS.len() + 1],
        micros: AtomicU64,
    }

    static ANSWERED: LazyLock<[Answered; VERBS.len()]> = LazyLock::new(Default::default);
    pub static RELAYED: AtomicU64 = AtomicU64::new(0);
    pub static RELAYS_FAILED: AtomicU64 = AtomicU64::new(0);

    pub fn count_answer(verb: &str, status: u16, time: Duration) {
        let answered = &ANSWERED[VERBS.iter().position(|it| *it == verb).unwrap_or(3)];
        // A main instance may answer with any number.
        answered.by_class[(status as usize / 100).min(5)].fetch_add(1, Relaxed);
        let seconds = time.as_secs_f64();
        let bucket = LIMITS.iter().position(|limit| seconds <= *limit).unwrap_or(LIMITS.len());
        answered.by_time[bucket].fetch_add(1, Relaxed);
        answered.micros.fetch_add(time.as_micros() as u64, Relaxed);
    }

    /// The metrics in the Prometheus text format 0.0.4, without the last line break.
    fn metrics() -> String {
        let head = |name: &str, kind: &str, help: &str| format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
        let mut text = head("kv_store_build_info", "gauge", "The version of the program.");
        text += &format!("kv_store_build_info{{version=\"{VERSION}\"}} 1\n");
        text += &head("kv_store_requests_total", "counter", "Answers to clients, by verb and class of status.");
        for (verb, answered) in VERBS.iter().zip(&*ANSWERED) {
            for (class, count) in answered.by_class.iter().enumerate().skip(2) {
                let count = count.load(Relaxed);
                text += &format!("kv_store_requests_total{{verb=\"{verb}\",class=\"{class}xx\"}} {count}\n");
            }
        }
        text += &head("kv_store_request_duration_seconds", "histogram", "From a request's arrival to its answer.");
        for (verb, answered) in VERBS.iter().zip(&*ANSWERED).take(3) {
            text += &histogram(verb, answered);
        }
        let (sums, version, incoming, silent) =
            Live.with(|node| (node.sums(), node.version().unwrap_or_default(), node.incoming(), node.silent()));
        for (name, kind, help, value) in [
            ("kv_store_relays_total", "counter", "Requests relayed to other instances.", RELAYED.load(Relaxed)),
            ("kv_store_relay_failures_total", "counter", "Relays without an answer.", RELAYS_FAILED.load(Relaxed)),
            ("kv_store_keys", "gauge", "Keys held.", sums.count as u64),
            ("kv_store_value_bytes", "gauge", "Bytes of the values held.", sums.bytes as u64),
            ("kv_store_connections", "gauge", "Open connections.", CONNECTIONS.load(Relaxed)),
            ("kv_store_table_epoch", "gauge", "Epoch of the table that this node goes by.", version.epoch),
            ("kv_store_table_number", "gauge", "Number of that table within its epoch.", version.number),
            ("kv_store_incoming_nodes", "gauge", "Nodes from which keys still come in.", incoming.len() as u64),
            ("kv_store_silent_nodes", "gauge", "Nodes that do not answer this one.", silent.len() as u64),
            ("process_start_time_seconds", "gauge", "When the process started, in Unix time.", START.1.as_secs()),
            ("process_resident_memory_bytes", "gauge", "Resident memory.", resident_bytes()),
        ] {
            text += &format!("{}{name} {value}\n", head(name, kind, help));
        }
        text.trim_end().to_owned()
    }

    fn histogram(verb: &str, answered: &Answered) -> String {
        let (name, mut text, mut count) = ("kv_store_request_duration_seconds", String::new(), 0);
        let limits = LIMITS.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (limit, in_bucket) in limits.zip(&answered.by_time) {
            count += in_bucket.load(Relaxed);
            text += &format!("{name}_bucket{{verb=\"{verb}\",le=\"{limit}\"}} {count}\n");
        }
        let sum = Duration::from_micros(answered.micros.load(Relaxed)).as_secs_f64();
        text + &format!("{name}_sum{{verb=\"{verb}\"}} {sum}\n{name}_count{{verb=\"{verb}\"}} {count}\n")
    }

    /// The resident memory of this process, by proc(5).
    fn resident_bytes() -> u64 {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        kilobytes.and_then(|count| count.parse().ok()).unwrap_or(0) * 1024
    }
}

// ---- Records: keys and values, in buckets ---------------------------------------------------------------------------

mod records {
    //! Stores the records of an instance. Keys are ordered by hash, and a `Span` is an interval of hashes, so keys with
    //! equal hashes are in the same span. Records stand in a fixed array of buckets, by the upper bits of the hash,
    //! each a small hash table. So work on many records can go bucket by bucket, with the lock released in between, and
    //! no large table ever grows at once. When records are written and dropped is decided in `node`.

    use hashbrown::hash_table::{Entry, HashTable};
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use serde_bytes::Bytes;
    use siphasher::sip::SipHasher24;
    use triomphe::ThinArc;

    /// SipHash-2-4 with a zero key (Aumasson and Bernstein, 2012), so that all nodes compute the same.
    pub fn hash_of(key: &[u8]) -> u64 {
        SipHasher24::new().hash(key)
    }

    /// The hashes from `first` to `last`, both included.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
    pub struct Span {
        pub first: u64,
        pub last: u64,
    }

    pub const ALL: Span = Span { first: 0, last: u64::MAX };

    impl Span {
        pub fn contains(&self, hash: u64) -> bool {
            (self.first..=self.last).contains(&hash)
        }

        pub fn overlaps(&self, other: &Span) -> bool {
            self.first <= other.last && other.first <= self.last
        }

        /// The number of hashes, minus one.
        pub fn width(&self) -> u64 {
            self.last - self.first
        }

        pub fn by_bucket(self) -> impl DoubleEndedIterator<Item = Span> {
            (bucket_of(self.first)..=bucket_of(self.last)).map(move |bucket| {
                let whole = span_of(bucket);
                Span { first: self.first.max(whole.first), last: self.last.min(whole.last) }
            })
        }
    }

    /// The limit of a key, in bytes: the contract allows 200 letters, or 50 characters of UTF-8.
    pub const MAX_KEY: usize = 200;

    /// A stamp, the key's length in a byte, the key, and the value as JSON text, in one allocation. A clone copies a
    /// pointer, so that answers are made after the node is unlocked.
    #[derive(Clone, Debug)]
    pub struct Record(ThinArc<u64, u8>);

    impl Record {
        /// Makes a record without a stamp. Panics if the key is longer than `MAX_KEY`.
        pub fn new(key: &[u8], value: &str) -> Record {
            assert!(key.len() <= MAX_KEY);
            Record::from_parts(0, &[&[key.len() as u8], key, value.as_bytes()].concat())
        }

        fn from_parts(stamp: u64, bytes: &[u8]) -> Record {
            Record(ThinArc::from_header_and_slice(stamp, bytes))
        }

        /// A record without a value: the mark of a deletion.
        pub fn tombstone(key: &[u8]) -> Record {
            Record::new(key, "")
        }

        pub fn is_tombstone(&self) -> bool {
            self.value().is_empty()
        }

        pub fn stamp(&self) -> u64 {
            self.0.header.header
        }

        /// Stamps a new record. Has no effect on one that has a clone.
        pub fn set_stamp(&mut self, stamp: u64) {
            self.0.with_arc_mut(|arc| {
                if let Some(record) = triomphe::Arc::get_mut(arc) {
                    *record.header_mut() = stamp;
                }
            });
        }

        pub fn key(&self) -> &[u8] {
            &self.0.slice[1..1 + self.0.slice[0] as usize]
        }

        pub fn value(&self) -> &[u8] {
            &self.0.slice[1 + self.0.slice[0] as usize..]
        }

        pub fn hash(&self) -> u64 {
            hash_of(self.key())
        }

        /// Last-writer-wins: the higher stamp. Two nodes may give one stamp twice, if the hashes of their names end
        /// with the same bits (`NODE_BITS`). Then the greater value wins.
        pub fn beats(&self, other: &Record) -> bool {
            (self.stamp(), self.value()) > (other.stamp(), other.value())
        }

        pub fn weight(&self) -> usize {
            self.0.slice.len() + 32
        }
    }

    impl Serialize for Record {
        fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
            (self.stamp(), Bytes::new(&self.0.slice)).serialize(to)
        }
    }

    /// Does not check that the value is JSON, which the node that took it from the client did: 1 MiB takes 5 ms.
    impl<'de> Deserialize<'de> for Record {
        fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Record, D::Error> {
            let (stamp, bytes) = <(u64, &Bytes)>::deserialize(from)?;
            let has_key = bytes.split_first().is_some_and(|(length, rest)| rest.len() >= *length as usize);
            if has_key { Ok(Record::from_parts(stamp, bytes)) } else { Err(D::Error::custom("not a key and a value")) }
        }
    }

    /// Keys (not tombstones), bytes of all values, and XOR of a mix of hash and stamp over all records and tombstones.
    #[derive(Clone, Copy, Debug, Default, PartialEq)]
    pub struct Sums {
        pub count: usize,
        pub bytes: usize,
        pub digest: u64,
    }

    impl Sums {
        fn of(hash: u64, record: &Record) -> Sums {
            // A multiplication moves bits upwards (Knuth, TAOCP 6.4), and the shift brings them down.
            let mixed = (hash ^ record.stamp().rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let count = usize::from(!record.is_tombstone());
            Sums { count, bytes: record.value().len(), digest: mixed ^ mixed >> 29 }
        }

        pub fn add(&mut self, more: Sums) {
            self.count += more.count;
            self.bytes += more.bytes;
            self.digest ^= more.digest;
        }

        fn subtract(&mut self, less: Sums) {
            self.count -= less.count;
            self.bytes -= less.bytes;
            self.digest ^= less.digest;
        }
    }

    #[derive(Default)]
    pub struct Bucket {
        table: HashTable<Record>,
        sums: Sums,
    }

    /// The upper bits of a hash that choose the bucket; fewer in the simulation, which starts 100,000 nodes.
    const BUCKET_BITS: u32 = if cfg!(test) { 6 } else { 14 };

    fn bucket_of(hash: u64) -> usize {
        (hash >> (u64::BITS - BUCKET_BITS)) as usize
    }

    fn span_of(bucket: usize) -> Span {
        let first = (bucket as u64) << (u64::BITS - BUCKET_BITS);
        Span { first, last: first | u64::MAX >> BUCKET_BITS }
    }

    pub struct Records {
        buckets: Vec<Bucket>,
        sums: Sums,
    }

    impl Default for Records {
        fn default() -> Records {
            Records { buckets: (0..1 << BUCKET_BITS).map(|_| Bucket::default()).collect(), sums: Sums::default() }
        }
    }

    impl Bucket {
        fn split_off(&mut self, part: Span) -> Bucket {
            let mut gone = Bucket::default();
            for record in self.table.extract_if(|record| part.contains(record.hash())) {
                gone.sums.add(Sums::of(record.hash(), &record));
                gone.table.insert_unique(record.hash(), record, Record::hash);
            }
            self.sums.subtract(gone.sums);
            gone
        }
    }

    impl Records {
        pub fn total(&self) -> Sums {
            self.sums
        }

        pub fn get(&self, hash: u64, key: &[u8]) -> Option<&Record> {
            self.buckets[bucket_of(hash)].table.find(hash, |record| record.key() == key)
        }

        pub fn insert(&mut self, hash: u64, record: Record) -> Option<Record> {
            let bucket = &mut self.buckets[bucket_of(hash)];
            let came = Sums::of(hash, &record);
            let old = match bucket.table.entry(hash, |it| it.key() == record.key(), Record::hash) {
                Entry::Occupied(mut old) => Some(std::mem::replace(old.get_mut(), record)),
                Entry::Vacant(place) => {
                    place.insert(record);
                    None
                }
            };
            let gone = old.as_ref().map_or(Sums::default(), |old| Sums::of(hash, old));
            for sums in [&mut bucket.sums, &mut self.sums] {
                sums.add(came);
                sums.subtract(gone);
            }
            old
        }

        pub fn remove_tombstone(&mut self, hash: u64, stamp: u64) {
            let bucket = &mut self.buckets[bucket_of(hash)];
            let is_it = |record: &Record| record.stamp() == stamp && record.is_tombstone();
            if let Ok(place) = bucket.table.find_entry(hash, is_it) {
                let gone = Sums::of(hash, &place.remove().0);
                bucket.sums.subtract(gone);
                self.sums.subtract(gone);
            }
        }

        /// Removes a span. The caller drops the records after it has released the lock, since freeing many takes long.
        pub fn remove(&mut self, span: Span) -> Vec<Bucket> {
            let mut removed = Vec::new();
            for part in span.by_bucket() {
                let bucket = &mut self.buckets[bucket_of(part.first)];
                if !bucket.table.is_empty() {
                    let is_whole = part == span_of(bucket_of(part.first));
                    let gone = if is_whole { std::mem::take(bucket) } else { bucket.split_off(part) };
                    self.sums.subtract(gone.sums);
                    removed.push(gone);
                }
            }
            removed
        }

        fn of_part(&self, part: Span) -> impl Iterator<Item = &Record> {
            let table = &self.buckets[bucket_of(part.first)].table;
            table.iter().filter(move |record| part.contains(record.hash()))
        }

        /// Reads single records only in buckets that the span cuts.
        pub fn sums_of(&self, span: Span) -> Sums {
            let mut sums = Sums::default();
            for part in span.by_bucket() {
                let index = bucket_of(part.first);
                if part == span_of(index) {
                    sums.add(self.buckets[index].sums);
                } else {
                    self.of_part(part).for_each(|record| sums.add(Sums::of(record.hash(), record)));
                }
            }
            sums
        }

        pub fn digests_of(&self, span: Span) -> Vec<u64> {
            span.by_bucket().map(|part| self.sums_of(part).digest).collect()
        }

        /// The first records of a span by hash, about `limit` bytes, and the hash up to which they are complete.
        pub fn first_of(&self, span: Span, limit: usize) -> (Vec<Record>, u64) {
            let (mut found, mut weight): (Vec<Record>, usize) = (Vec::new(), 0);
            for part in span.by_bucket() {
                let mut records: Vec<(u64, &Record)> = self.of_part(part).map(|it| (it.hash(), it)).collect();
                records.sort_unstable_by_key(|(hash, _)| *hash);
                for (index, (hash, record)) in records.iter().enumerate() {
                    // Records with equal hashes stay together.
                    if weight > limit && *hash > part.first && (index == 0 || records[index - 1].0 < *hash) {
                        return (found, hash - 1);
                    }
                    weight += record.weight();
                    found.push((*record).clone());
                }
            }
            (found, span.last)
        }

        /// The hashes of the keys of a span, in order. Only for spans with few keys, or within one bucket. Skips
        /// buckets with tombstones alone: there may be millions of these while a node is silent.
        pub fn hashes_of(&self, span: Span) -> Vec<u64> {
            let parts = span.by_bucket().filter(|part| self.sums_of(*part).count > 0);
            let keys = parts.flat_map(|part| self.of_part(part)).filter(|record| !record.is_tombstone());
            let mut hashes: Vec<u64> = keys.map(Record::hash).collect();
            hashes.sort_unstable();
            hashes
        }

        /// R12: the hash at which to cut so that `n` keys (at least 1) of the ordered spans lie at or above it: halfway
        /// between the n-th key from the end and the one before. 0 if there is none before.
        pub fn cut_above(&self, spans: &[Span], mut n: usize) -> u64 {
            let mut above = 0;
            for part in spans.iter().rev().flat_map(|span| span.by_bucket().rev()) {
                let count = self.sums_of(part).count;
                if count < n {
                    n -= count;
                    continue;
                }
                for hash in self.hashes_of(part).into_iter().rev() {
                    if n == 0 {
                        return hash + (above - hash) / 2 + 1;
                    }
                    above = hash;
                    n -= 1;
                }
            }
            0
        }
    }
}

// ---- Tables: which shard owns which hashes --------------------------------------------------------------------------

mod table {
    //! A table divides the hashes into ranges. It names the shard that owns each range, and its *sources*: groups of
    //! nodes that owned it before, if they are not the owners now. `Table::next` makes the table of a view change.
    //! `Change` plans it (R12): it deals nodes out to shards, decides how many keys move where, and spreads hash space
    //! without keys. This is pure computation; `membership` collects the input and puts the result in force.

    use std::collections::BTreeSet;
    use std::fmt::{self, Display, Formatter};

    use serde::{Deserialize, Serialize};

    use crate::records::{Span, hash_of};
    use crate::settings::{parse_view, port_of};

    /// Ordered by epoch first: leaving out silent nodes begins a new one, which beats any table that they made.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
    pub struct Version {
        pub epoch: u64,
        pub number: u64,
        /// The coordinator's incarnation, which tells apart tables with one number. A first table has the size of its
        /// view in the upper 16 bits, so that the larger view wins, and a hash of view and factor below.
        pub coordinator: u64,
    }

    impl Display for Version {
        fn fmt(&self, out: &mut Formatter) -> fmt::Result {
            write!(out, "{}.{}", self.epoch, self.number)
        }
    }

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    pub struct Range {
        /// The first hash. The range ends where the next one begins.
        pub from: u64,
        pub shard: usize,
        pub sources: Vec<Vec<String>>,
    }

    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    pub struct Table {
        pub version: Version,
        /// The version of the table that this one was made from.
        pub base: Version,
        /// Identifies the store: equal in all tables that descend from one first table.
        pub store: u64,
        pub view: Vec<String>,
        pub factor: usize,
        pub shards: Vec<Vec<String>>,
        pub ranges: Vec<Range>,
        /// The last nodes that left. One that starts again must be told, or it begins its first store anew (R11).
        pub left: Vec<String>,
        /// How many keys change their shard by this table, and how many each shard has afterwards.
        pub moved: usize,
        pub counts: Vec<usize>,
    }

    const MAX_RANGES: usize = 100_000;
    const MAX_LEFT: usize = 20;

    impl Table {
        /// The table of a store without a view change: equal ranges, and nodes dealt out in the order of the view.
        pub fn first(view: Vec<String>, factor: usize) -> Table {
            let mut nodes = view.iter().cloned();
            let sizes = shard_sizes(view.len(), factor).into_iter();
            let shards: Vec<Vec<String>> = sizes.map(|size| nodes.by_ref().take(size).collect()).collect();
            let share = |index| (index as u128 * (1 << 64) / shards.len() as u128) as u64;
            let ranges =
                (0..shards.len()).map(|shard| Range { from: share(shard), shard, sources: Vec::new() }).collect();
            let coordinator =
                (view.len() as u64) << 48 | hash_of(format!("{} {factor}", view.join(",")).as_bytes()) >> 16;
            let version = Version { coordinator, ..Version::default() };
            Table { version, store: coordinator, view, factor, shards, ranges, ..Table::default() }
        }

        pub fn is_valid(&self) -> bool {
            let is_of_view = |shard: &Vec<String>| !shard.is_empty() && shard.iter().all(|node| self.lists(node));
            let sources = self.ranges.iter().flat_map(|range| range.sources.iter().flatten());
            parse_view(self.view.iter().map(String::as_str)).is_ok()
                && (1..=1000).contains(&self.factor)
                && (1..=self.view.len()).contains(&self.shards.len())
                && self.shards.iter().all(is_of_view)
                && self.ranges.first().is_some_and(|range| range.from == 0)
                && self.ranges.len() <= MAX_RANGES
                && self.ranges.is_sorted_by(|one, next| one.from < next.from)
                && self.ranges.iter().all(|range| range.shard < self.shards.len())
                && sources.chain(&self.left).all(|node| port_of(node).is_some())
        }

        fn index_at(&self, hash: u64) -> usize {
            self.ranges.partition_point(|range| range.from <= hash) - 1
        }

        pub fn range_at(&self, hash: u64) -> &Range {
            &self.ranges[self.index_at(hash)]
        }

        pub fn shard_at(&self, hash: u64) -> usize {
            self.range_at(hash).shard
        }

        pub fn owners(&self, hash: u64) -> &[String] {
            &self.shards[self.shard_at(hash)]
        }

        pub fn shard_of(&self, node: &str) -> Option<usize> {
            self.shards.iter().position(|shard| shard.iter().any(|it| it == node))
        }

        pub fn lists(&self, node: &str) -> bool {
            self.view.iter().any(|it| it == node)
        }

        /// The nodes of the view and, unless the table is settled, of the sources.
        pub fn nodes(&self, settled: bool) -> BTreeSet<&String> {
            let sources = self.ranges.iter().filter(|_| !settled).flat_map(|range| range.sources.iter().flatten());
            self.view.iter().chain(sources).collect()
        }

        pub fn spans(&self) -> impl Iterator<Item = (Span, &Range)> {
            let ends = self.ranges.iter().skip(1).map(|range| range.from - 1).chain([u64::MAX]);
            self.ranges.iter().zip(ends).map(|(range, last)| (Span { first: range.from, last }, range))
        }

        pub fn spans_of(&self, shard: Option<usize>) -> Vec<Span> {
            self.spans().filter(|(_, range)| Some(range.shard) == shard).map(|(span, _)| span).collect()
        }

        /// The table of a view change: each shard goes on as `change` says and gives away its cuts. The sources of a
        /// range are its owners by this table and, until this one is settled, its sources; without those `left_out`.
        pub fn next(
            &self,
            version: Version,
            change: &Change,
            cuts: &[Cut],
            left_out: &[String],
            settled: bool,
        ) -> Table {
            let mut places: Vec<u64> = self.ranges.iter().map(|range| range.from).collect();
            places.extend(cuts.iter().flat_map(|cut| [cut.span.first, cut.span.last.wrapping_add(1)]));
            places.sort_unstable();
            places.dedup();
            let mut ranges: Vec<Range> = Vec::new();
            for from in places {
                let index = self.index_at(from);
                let before = &self.ranges[index];
                let cut = cuts.iter().rev().find(|cut| cut.giver == before.shard && cut.span.contains(from));
                // A shard that ends has given its keys away by cuts. What remains has no keys, or keys that are given
                // up by force: these ranges go to the shards in turn.
                let in_turn = index % change.shards.len();
                let shard = cut.map(|cut| cut.receiver).or(change.kept[before.shard]).unwrap_or(in_turn);
                let owners: BTreeSet<&String> = change.shards[shard].iter().collect();
                let mut sources: Vec<Vec<String>> = Vec::new();
                for group in before.sources.iter().filter(|_| !settled).chain([&self.shards[before.shard]]) {
                    let group: BTreeSet<&String> = group.iter().filter(|node| !left_out.contains(node)).collect();
                    // If the owners stay the same, they have the records and reconcile.
                    if !group.is_empty() && group != owners {
                        sources.push(group.into_iter().cloned().collect());
                    }
                }
                sources.dedup();
                if ranges.last().is_none_or(|last| (last.shard, &last.sources) != (shard, &sources)) {
                    ranges.push(Range { from, shard, sources });
                }
            }
            let Change { view, factor, shards, .. } = change;
            let left = self.view.iter().chain(&self.left).filter(|node| !view.contains(node));
            let left = left.take(MAX_LEFT).cloned().collect();
            let (view, factor, shards, base) = (view.clone(), *factor, shards.clone(), self.version);
            Table { version, base, store: self.store, view, factor, shards, ranges, left, ..Table::default() }
        }
    }

    /// A span that moves from a shard of the old table to one of the new. A later cut overrides earlier ones.
    #[derive(Clone, Debug)]
    pub struct Cut {
        pub giver: usize,
        pub span: Span,
        pub receiver: usize,
    }

    /// Giver, receiver, number of keys.
    pub type Move = (usize, usize, usize);

    /// The indices of some numbers, sorted by number. Equal numbers keep their order.
    fn in_order(numbers: impl Iterator<Item = u64>) -> Vec<usize> {
        let mut numbers: Vec<(u64, usize)> = numbers.zip(0..).collect();
        numbers.sort_unstable();
        numbers.into_iter().map(|(_, index)| index).collect()
    }

    fn shard_sizes(nodes: usize, factor: usize) -> Vec<usize> {
        let count = (nodes / factor).max(1);
        (0..count).map(|shard| nodes / count + usize::from(shard < nodes % count)).collect()
    }

    pub struct Change {
        pub view: Vec<String>,
        pub factor: usize,
        pub shards: Vec<Vec<String>>,
        /// For each old shard the new one that continues it; None if the shard ends.
        pub kept: Vec<Option<usize>>,
    }

    impl Change {
        /// Deals out a view so that as few nodes as possible change their shard: the old shards with most nodes left go
        /// on, and other nodes fill them up. Shards are numbered by their first nodes in the view.
        pub fn new(old: &Table, view: &[String], factor: usize) -> Change {
            let sizes = shard_sizes(view.len(), factor);
            let place = |node: &String| view.iter().position(|it| it == node).unwrap_or(0);
            let staying = |shard: &Vec<String>| view.iter().filter(|node| shard.contains(node)).cloned().collect();
            let left: Vec<Vec<String>> = old.shards.iter().map(staying).collect();
            // The shards with most nodes left come first and get the largest sizes; those beyond the new number end.
            let largest_first = in_order(left.iter().map(|nodes| u64::MAX - nodes.len() as u64)).into_iter();
            let mut groups: Vec<(Option<usize>, Vec<String>)> =
                largest_first.map(|shard| (Some(shard), left[shard].clone())).collect();
            groups.retain(|(_, nodes)| !nodes.is_empty());
            groups.resize(sizes.len(), (None, Vec::new()));
            for ((_, nodes), size) in groups.iter_mut().zip(&sizes) {
                nodes.truncate(*size);
            }
            let taken: BTreeSet<String> = groups.iter().flat_map(|(_, nodes)| nodes.clone()).collect();
            let mut free = view.iter().filter(|node| !taken.contains(*node)).cloned();
            for ((_, nodes), size) in groups.iter_mut().zip(&sizes) {
                nodes.extend(free.by_ref().take(size - nodes.len()));
                nodes.sort_by_key(place);
            }
            let by_first = in_order(groups.iter().map(|(_, nodes)| place(&nodes[0]) as u64));
            let goes_on_as = |shard: usize| by_first.iter().position(|group| groups[*group].0 == Some(shard));
            let kept = (0..old.shards.len()).map(goes_on_as).collect();
            let shards = by_first.iter().map(|group| groups[*group].1.clone()).collect();
            Change { view: view.to_vec(), factor, shards, kept }
        }

        /// Plans the moves of keys and the resulting counts: shards differ by one key at most, and no more keys move
        /// than that needs. `held` has the counts of the old shards.
        pub fn plan(&self, held: &[usize]) -> (Vec<Move>, Vec<usize>) {
            let (total, count): (usize, usize) = (held.iter().sum(), self.shards.len());
            let mut counts = vec![0; count];
            for (keys, shard) in held.iter().zip(&self.kept) {
                if let Some(shard) = shard {
                    counts[*shard] = *keys;
                }
            }
            // The shards with the most keys take the remainder, which saves moves.
            let largest_first = in_order(counts.iter().map(|count| u64::MAX - *count as u64));
            let mut targets = vec![0; count];
            for (rank, shard) in largest_first.into_iter().enumerate() {
                targets[shard] = total / count + usize::from(rank < total % count);
            }
            let mut moves = Vec::new();
            for (giver, keys) in held.iter().enumerate() {
                let mut surplus = self.kept[giver].map_or(*keys, |shard| keys.saturating_sub(targets[shard]));
                for receiver in 0..count {
                    let moving = surplus.min(targets[receiver].saturating_sub(counts[receiver]));
                    if moving > 0 {
                        surplus -= moving;
                        counts[receiver] += moving;
                        moves.push((giver, receiver, moving));
                    }
                }
            }
            (moves, targets)
        }

        /// Adds cuts of hash space without keys if a shard has less than half or more than twice the mean, so that
        /// later keys spread. `keys` are the hashes of all keys of those old shards that have few.
        pub fn deal_out_stretches(&self, old: &Table, mut cuts: Vec<Cut>, keys: &[Option<Vec<u64>>]) -> Vec<Cut> {
            let mean = u64::MAX / self.shards.len() as u64;
            let table = old.next(Version::default(), self, &cuts, &[], true);
            let mut widths = vec![0; self.shards.len()];
            table.spans().for_each(|(span, range)| widths[range.shard] += span.width());
            if widths.iter().all(|width| *width >= mean / 2 && *width / 2 <= mean) {
                return cuts;
            }
            let mut poor = in_order(widths.iter().map(|width| u64::MAX - width));
            poor.retain(|shard| widths[*shard] < mean);
            for (giver, rich, mut stretch) in widest_stretches(old, &table, keys) {
                while let Some(receiver) = poor.last().copied().filter(|_| widths[rich] > mean && stretch.width() > 0) {
                    let part = (mean - widths[receiver]).min(widths[rich] - mean).min(stretch.width());
                    cuts.push(Cut { giver, span: Span { first: stretch.last - part + 1, ..stretch }, receiver });
                    stretch.last -= part;
                    widths[rich] -= part;
                    widths[receiver] += part;
                    if widths[receiver] == mean {
                        poor.pop();
                    }
                }
            }
            cuts
        }
    }

    /// Up to this number of keys, a shard reports the hashes of all of them.
    pub const MAX_FEW: usize = 1000;

    /// The stretches without keys, the widest first, each with its shards by the old and by the new table.
    fn widest_stretches(old: &Table, new: &Table, keys: &[Option<Vec<u64>>]) -> Vec<(usize, usize, Span)> {
        let mut stretches = Vec::new();
        for (span, range) in new.spans() {
            for (part, before) in old.spans().filter(|(part, _)| part.overlaps(&span)) {
                let Some(keys) = &keys[before.shard] else { continue };
                let both = Span { first: span.first.max(part.first), last: span.last.min(part.last) };
                let Span { mut first, last } = both;
                for key in keys.iter().filter(|key| both.contains(**key)) {
                    if first < *key {
                        stretches.push((before.shard, range.shard, Span { first, last: key - 1 }));
                    }
                    first = key.saturating_add(1);
                }
                if first <= last {
                    stretches.push((before.shard, range.shard, Span { first, last }));
                }
            }
        }
        stretches.sort_by_key(|(.., stretch)| u64::MAX - stretch.width());
        stretches
    }
}

// ---- The node: what it knows of its store, and what it decides ------------------------------------------------------

mod node {
    //! A node as one value, which receives messages and the time, and returns replies. It has no clock, network or
    //! statics, so the simulation runs many in one process. What it does over time is in `replication` and
    //! `membership`. Begin with the fields of `Node`, then read `place`, `adopt` and `write`.
    //!
    //! The rules of the protocol. Each is stated in full where it is implemented:
    //! - R1 answering: only an owner of a key by the table in use answers for it (`place`, `pull_needs`).
    //! - R2 pull: a new owner gets its records from the former owners (`note_received`, `replication::pull_all`).
    //! - R3 adopt: a node changes to a newer table in one step (`adopt`, `pulls_by`).
    //! - R4 write: all reachable replicas have a write before it is acknowledged (`write`, `take`, `lacking`).
    //! - R5 reconcile: replicas that may differ compare what they have (`begin_to_reconcile`, `replication`).
    //! - R6 stability: what all replicas have needs no tombstone and no context (`refresh_stable`, `drop_stable`).
    //! - R7 causal contexts: a read gets first what its context names, or is refused (`context_needs`).
    //! - R8 settled: once all nodes are whole, former owners are not needed (`settle`).
    //! - R9 view change: a coordinator locks all nodes and adopts a new table (`grant`, `membership`).
    //! - R10 start: a node finds the table of its store before it answers (`take_up_table`).
    //! - R11 meetings: nodes tell one another their status and newer tables (`begin_round`, `note_incarnation`).
    //! - R12 planning: which keys move, and where the hashes are cut (`table`).
    //!
    //! Terms:
    //! - A node *uses* the table that it adopted last. Without one it is *blank*. Its *incarnation* is a random number,
    //!   new at each start. It is *silent* to another node that got no answer to its last question.
    //! - A *lock* keeps a node from granting another coordinator's; what the node remembers of it is its *promise*.
    //! - A *pull* is a span that a node owns and has not got yet. A node without pulls is *whole* (`is_whole_by`; for a
    //!   span `is_whole_for`). It is *ready* if it can answer for all that it owns without asking others (`is_ready`).
    //!   For a span that it owns, or has kept, `may_give` says whether it can.
    //! - A table is *settled* when all nodes of its view are whole, and *in force* unless it is a first one that is not
    //!   settled. A node answers by a table in force (`may_answer`), unless it has just been asleep, or is about to
    //!   join a store.
    //! - A replica *lags* if it may lack a record that is here. A node's *claim* is the stamp up to which all replicas
    //!   have its writes. The lowest claim of all nodes is the *watermark*. A record at or below it is *stable*.

    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::Arc;
    use std::time::Duration;

    use serde::{Deserialize, Serialize};
    use serde_bytes::ByteBuf;

    use crate::records::{ALL, Bucket, Record, Records, Span, Sums, hash_of};
    use crate::table::{MAX_FEW, Table, Version};

    /// R7: what a client saw that a replica may lack: by node, the highest stamp; and the table, until it is settled.
    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    pub struct Context {
        pub seen: BTreeMap<u16, u64>,
        pub table: Option<Version>,
    }

    impl Context {
        pub fn is_empty(&self) -> bool {
            self.seen.is_empty() && self.table.is_none()
        }

        fn add(&mut self, stamp: u64) {
            let known = self.seen.entry(node_of(stamp)).or_default();
            *known = stamp.max(*known);
        }

        fn merge(&mut self, other: &Context) {
            other.seen.values().for_each(|stamp| self.add(*stamp));
            self.table = self.table.max(other.table);
        }

        fn highest(&self) -> u64 {
            self.seen.values().copied().max().unwrap_or(0)
        }
    }

    /// A stamp ends with this many bits of the hash of its node's name. The bits above are microseconds since 1970,
    /// which suffice until 2112.
    const NODE_BITS: u32 = 12;

    pub fn node_of(stamp: u64) -> u16 {
        (stamp & ((1 << NODE_BITS) - 1)) as u16
    }

    fn bits_of(name: &str) -> u16 {
        node_of(hash_of(name.as_bytes()))
    }

    fn stamp_at(time: Duration) -> u64 {
        (time.as_micros() as u64) << NODE_BITS
    }

    /// R11: what a node reports in a meeting. A blank node has no version. `stable_at` is in the order of the view.
    #[derive(Clone, Debug, Default, Serialize, Deserialize)]
    pub struct Status {
        pub incarnation: u64,
        pub version: Option<Version>,
        pub store: u64,
        pub settled: bool,
        /// The size of the view; 0 if this node is not in it.
        pub members: usize,
        pub keys: usize,
        pub digest: u64,
        /// Whether it has no pulls.
        pub is_whole: bool,
        pub is_ready: bool,
        pub clock: u64,
        pub promised: Version,
        /// The nodes that were asked for that lock, unless nothing came of it; or those of a table that a blank node
        /// has heard of, if that is newer than the lock.
        pub asked_for_lock: Vec<String>,
        pub stable_at: Vec<u64>,
        /// R10: the id of the store that its `VIEW` would begin. 0 once it has heard of a table, and before
        /// `MIN_ROUNDS`: two nodes must not adopt a first table before a third one, which has just started, has found
        /// them.
        pub first: u64,
    }

    impl Status {
        pub fn is_whole_by(&self, version: Version) -> bool {
            self.version == Some(version) && self.is_whole
        }
    }

    #[derive(Clone, Debug, Serialize, Deserialize)]
    pub struct Envelope {
        pub from: String,
        /// The address that the sender uses. Others are refused, or a node would count under two names.
        pub to: String,
        pub version: Option<Version>,
        /// The incarnations of the sender, and of the addressee as the sender knows it.
        pub incarnation: u64,
        pub to_incarnation: u64,
        pub message: Message,
    }

    #[derive(Clone, Debug, Serialize, Deserialize)]
    pub enum Message {
        Meet(Status),
        /// R9: the version to be made, and all nodes that are asked for this lock. Without nodes, nothing comes of it,
        /// and other coordinators need not wait for `LEASE`.
        Lock(Version, Vec<String>),
        /// R12: for each count, where to cut so that as many of the addressee's keys lie above.
        Survey(Version, Vec<usize>),
        /// R1 or, if the flag is set, R7: then the addressee must be whole for the key.
        GiveKey(ByteBuf, bool),
        Digests(Span),
        /// R5: compare with what the sender has of a span, by hash and stamp.
        Compare(Span, Vec<(u64, u64)>),
        /// R4: what the sender has written.
        Push(Copied),
        /// R5: what the addressee lacks, whoever wrote it.
        Give(Vec<Copied>),
    }

    impl Message {
        /// A node that takes longer is marked silent. A meeting must fit into the second that a starting node waits
        /// (R10), but for a large view (`begin_to_deliver`).
        pub fn limit(&self) -> Duration {
            Duration::from_millis(match self {
                Message::Meet(_) | Message::GiveKey(..) => 700,
                Message::Push(_) => 1200,
                _ => 1500,
            })
        }
    }

    #[derive(Clone, Debug, Serialize, Deserialize)]
    pub enum Reply {
        /// To a meeting, or a lock, which is granted if the status has it as promised. With the table if that is newer:
        /// tables come in replies only, since a message may be from an earlier incarnation.
        Met(Box<Status>, Option<Table>),
        /// The cuts, and the hashes of all keys if these are few.
        Surveyed(Vec<u64>, Option<Vec<u64>>),
        Key(Option<Copied>),
        /// The digest of each bucket, and whether this node is whole for the span.
        Digests(Vec<u64>, bool),
        /// What is newer here, hash and stamp of what is newer there, and the last hash compared.
        Compared(Vec<Copied>, Vec<(u64, u64)>, u64),
        Done,
        /// The sender has another table or incarnation, this node is not whole, or the question is too late.
        Refused,
    }

    /// A record in transit, and its writer's context until that is stable.
    pub type Copied = (Record, Context);

    /// About how many bytes of records a message has. (In the simulation, one record or two.)
    pub const MAX_BATCH: usize = if cfg!(test) { 40 } else { 256 << 10 };
    /// For how long a lock excludes other coordinators.
    pub const LEASE: Duration = Duration::from_secs(10);
    /// A node that did nothing for this long was asleep. Others need 1.95 s at least to remove it from the view: 1.25 s
    /// (`SILENCE` less `BEAT`) until its stream ends, and 0.7 s until a meeting fails.
    const ASLEEP: Duration = Duration::from_millis(1500);
    /// For how long a node that was asleep tries to meet another one before it answers.
    const WAKING: Duration = Duration::from_secs(1);
    /// R10: for how many rounds a node looks for a newer table before it goes by a first one: a second.
    const MIN_ROUNDS: u32 = 5;
    /// R5: for how long digests must differ. A writer that dies after it pushed to some replicas leaves the others
    /// behind, which only their digests show, and replicas must agree within 5 s (the contract). But while clients
    /// write, digests differ in most meetings.
    const DIFFERING: Duration = Duration::from_secs(2);

    #[derive(Debug, PartialEq)]
    pub enum Place {
        Here,
        There(Vec<String>),
        /// This node knows of no other owner and has no table, or does not know whether that is in force.
        Unknown,
    }

    /// R2: a span that this node owns and has not got yet.
    #[derive(Clone, Debug, Default)]
    pub struct Pull {
        pub span: Span,
        /// The nodes to pull from. A whole one of them has every record of the span.
        pub group: Vec<String>,
        /// Nodes that have nothing more to give.
        received: BTreeSet<String>,
        /// Whether one of these was whole.
        is_answerable: bool,
        /// Consecutive rounds in which every awaited node was incomplete.
        incomplete_rounds: u32,
        /// Whether the table names the group. Otherwise it is the other replicas, as this node has kept no records.
        is_source: bool,
    }

    impl Pull {
        pub fn awaited(&self) -> impl Iterator<Item = &String> {
            self.group.iter().filter(|node| !self.received.contains(*node))
        }

        /// No node is awaited, or each was incomplete in two rounds in a row. Then there was no whole node when the
        /// first of these rounds ended, and what all of them gave is all there is.
        fn is_done(&self) -> bool {
            self.incomplete_rounds > 1 || self.awaited().next().is_none()
        }
    }

    #[derive(Clone, Copy, PartialEq)]
    pub enum Giver {
        Whole,
        Incomplete,
        /// Blank, or in another store: it has nothing for this one.
        Restarted,
    }

    #[derive(Default)]
    struct Promise {
        version: Version,
        /// By lock of which a table may have come, all nodes that were asked for it. A released one is not here.
        asked: BTreeMap<Version, Vec<String>>,
        granted: Option<Duration>,
        /// Set while this node may join this coordinator's store. It answers nothing then: it would drop what it took.
        joining: Option<String>,
    }

    #[derive(Default)]
    struct Peer {
        status: Status,
        silent: bool,
        /// Questions that began by then and failed do not make it silent (`note_alive`).
        alive_at: Duration,
        differs: Option<Duration>,
        /// When the first reply of this incarnation came.
        replied_since: Duration,
    }

    /// What a node does over time, on a thread of its own (`membership::run`).
    #[derive(Clone, Debug)]
    pub enum Activity {
        Meet(String),
        Pull(Version),
    }

    /// What to do once the node is unlocked: lines to print, records to free, activities to begin.
    #[derive(Default)]
    pub struct Later {
        pub lines: Vec<String>,
        pub garbage: Vec<Bucket>,
        pub activities: Vec<Activity>,
    }

    /// The nodes that have a write, in which incarnation and by which table: adopting another may have dropped it.
    pub type Stored = BTreeMap<String, (u64, Option<Version>)>;

    #[derive(Default)]
    pub struct Node {
        own: String,
        /// The table of the store that its `VIEW` would begin.
        pub first: Arc<Table>,
        incarnation: u64,
        pub now: Duration,
        pub later: Later,
        table: Option<Arc<Table>>,
        pub shard: Option<usize>,
        /// R8. This node then has no records but those it owns.
        pub settled: bool,
        /// R10: while this node is blank, the newest table that it has heard of.
        heard_of: Option<Arc<Table>>,
        promise: Promise,
        pub lease: Duration,
        pub coordinating: bool,
        pub records: Records,
        /// By stamp and hash, the contexts of the records that R6 and R7 still need. All tombstones are here.
        unstable: BTreeMap<(u64, u64), Context>,
        /// A hybrid logical clock (Kulkarni et al., 2014): the highest stamp given or seen.
        clock: u64,
        pulls: Vec<Pull>,
        /// Spans of which this node may lack records: it has not pulled them by an earlier table, or dropped all. It
        /// is not whole for these unless it owns and has pulled them now. Empty once the table is settled.
        not_pulled: Vec<Span>,
        /// R5: the replicas that may lack something that is here: until they were reconciled with, no claim rises (R6).
        pub lagging: BTreeSet<String>,
        /// The replicas that are being reconciled with. What fails meanwhile lets them lag again.
        reconciling: BTreeSet<String>,
        /// The stamps of own writes that are not acknowledged yet.
        in_flight: BTreeSet<u64>,
        stable_at: Vec<u64>,
        /// R6: every replica has every write up to this stamp.
        watermark: u64,
        peers: BTreeMap<String, Peer>,
        /// When it woke up, until it has met a member.
        woke_at: Option<Duration>,
        rounds: u32,
    }

    impl Node {
        pub fn new(own: String, view: Vec<String>, factor: usize, incarnation: u64, now: Duration) -> Node {
            let first = Arc::new(Table::first(view, factor));
            Node { own, first, incarnation, now, lease: LEASE, ..Node::default() }
        }

        fn say(&mut self, line: String) {
            self.later.lines.push(line);
        }

        pub fn own(&self) -> &str {
            &self.own
        }

        pub fn table(&self) -> Option<Arc<Table>> {
            self.table.clone()
        }

        pub fn version(&self) -> Option<Version> {
            self.table.as_ref().map(|table| table.version)
        }

        /// The id of its store; of a blank node, of the store that it has heard of.
        pub fn store(&self) -> u64 {
            self.table.as_ref().or(self.heard_of.as_ref()).map_or(0, |table| table.store)
        }

        pub fn own_spans(&self) -> Vec<Span> {
            self.table.as_ref().map_or(Vec::new(), |table| table.spans_of(self.shard))
        }

        /// The sums of what this node owns. Until the table is settled, it may have other records.
        pub fn sums(&self) -> Sums {
            if self.settled {
                return self.records.total();
            }
            let mut sums = Sums::default();
            self.own_spans().into_iter().for_each(|span| sums.add(self.records.sums_of(span)));
            sums
        }

        /// The other replicas of this node's shard.
        pub fn others(&self) -> Vec<String> {
            let (Some(table), Some(shard)) = (&self.table, self.shard) else { return Vec::new() };
            self.without_own(&table.shards[shard])
        }

        fn without_own<'a>(&self, nodes: impl IntoIterator<Item = &'a String>) -> Vec<String> {
            nodes.into_iter().filter(|node| **node != self.own).cloned().collect()
        }

        fn is_replica(&self, node: &str) -> bool {
            self.others().iter().any(|it| it == node)
        }

        /// The other nodes of the table and, until it is settled, of its sources, in the order of their names.
        fn members(&self) -> Vec<String> {
            self.without_own(self.table.iter().flat_map(|table| table.nodes(self.settled)))
        }

        // -- R1 answering

        /// R1: only the replicas of the shard that owns a key by the table answer for it. A node that has adopted a
        /// newer table never answers again for what it gave away, and the new owner first gets the key from a node that
        /// has adopted that table. So each key is answered for by one table at a time. A first table must be settled: a
        /// node that is still blank has no part in a write, and could not keep it if the node that took it dies. A
        /// blank node relays by the table that it has heard of: whoever answers goes by its own.
        pub fn place(&self, hash: u64) -> Place {
            let in_use = self.table.as_ref().filter(|_| self.may_answer() && self.is_in_force());
            let heard_of = self.heard_of.as_ref().filter(|table| self.may_go_by(table));
            let Some(table) = in_use.or(heard_of) else { return Place::Unknown };
            if Some(table.shard_at(hash)) == self.shard {
                return Place::Here;
            }
            let others = self.without_own(table.owners(hash));
            if others.is_empty() { Place::Unknown } else { Place::There(self.ranked(others)) }
        }

        /// R10: whether this blank node may use a table that it has heard of. One that does not list it may be of
        /// another store: a node of its `VIEW` may have left, and begun a store of its own. The members of this node's
        /// store look for it, and find it within a second.
        fn may_go_by(&self, table: &Table) -> bool {
            table.lists(&self.own) || self.rounds >= MIN_ROUNDS
        }

        pub fn is_in_force(&self) -> bool {
            self.settled || self.table.as_ref().is_some_and(|table| table.version.number > 0)
        }

        /// R1: the groups of which a node must give the key before this node answers.
        pub fn pull_needs(&self, hash: u64) -> Vec<Vec<String>> {
            let open = self.pulls.iter().filter(|pull| pull.span.contains(hash) && !pull.is_answerable);
            open.map(|pull| pull.group.clone()).collect()
        }

        /// Sorts nodes for asking: last the silent ones, before them those that would have to get the key first.
        pub fn ranked(&self, mut nodes: Vec<String>) -> Vec<String> {
            nodes.sort_by_key(|node| match self.peers.get(node) {
                Some(peer) if peer.silent => 3,
                Some(peer) if !peer.status.is_ready => 2,
                // The same order each time, but not at every node.
                _ => (hash_of(node.as_bytes()) ^ self.incarnation) % 2,
            });
            nodes
        }

        pub fn may_answer(&self) -> bool {
            self.table.is_some() && !self.is_waking() && self.promise.joining.is_none()
        }

        /// R11: a node that was asleep may have been left out of the view. It meets a member before it answers.
        fn is_waking(&self) -> bool {
            let has_others = self.table.as_ref().is_some_and(|table| table.view.len() > 1);
            has_others && self.woke_at.is_some_and(|woke_at| self.now < woke_at + WAKING)
        }

        /// Sets the time. Must be called whenever the node is locked.
        pub fn look_at_clock(&mut self, now: Duration) {
            if now > self.now + ASLEEP {
                self.woke_at = Some(now);
            }
            self.now = self.now.max(now);
        }

        /// R11: notes a meeting with a node of the view. Meeting one that has left proves nothing: it may not have
        /// heard yet of a newer table, by which this node has left too.
        pub fn note_meeting(&mut self, node: &str, began: Duration) {
            if node != self.own && self.table.as_ref().is_some_and(|table| table.lists(node)) {
                self.woke_at = self.woke_at.filter(|woke_at| began < *woke_at);
            }
        }

        // -- R2 pull

        /// R2: whether this node has all of a span of one range.
        fn is_whole_for(&self, span: Span) -> bool {
            self.may_give(span) && !self.pulls.iter().any(|pull| pull.span.overlaps(&span))
        }

        /// R1: whether this node may answer for a span of one range, or could until it adopted its table.
        fn may_give(&self, span: Span) -> bool {
            let owns = self.table.as_ref().is_some_and(|table| Some(table.shard_at(span.first)) == self.shard);
            let has_kept = !self.settled && !self.not_pulled.iter().any(|lack| lack.overlaps(&span));
            (owns || has_kept) && !self.pulls.iter().any(|pull| pull.span.overlaps(&span) && !pull.is_answerable)
        }

        fn drop_records(&mut self, span: Span) {
            self.later.garbage.extend(self.records.remove(span));
        }

        fn give_key(&self, key: &[u8], for_context: bool) -> Reply {
            let hash = hash_of(key);
            let span = Span { first: hash, last: hash };
            let may_give = if for_context { self.is_whole_for(span) } else { self.may_give(span) };
            if !may_give {
                return Reply::Refused;
            }
            Reply::Key(self.records.get(hash, key).map(|record| (record.clone(), self.context_of(record))))
        }

        /// To send a record that was got under an earlier lock: the present one of its key, with its context. One that
        /// was replaced meanwhile has no context any more.
        pub fn copy_of(&self, record: &Record) -> Copied {
            let present = self.records.get(record.hash(), record.key()).unwrap_or(record);
            (present.clone(), self.context_of(present))
        }

        /// Empty once another table was adopted.
        pub fn pulls_left(&self, version: Version) -> Vec<Pull> {
            if self.version() == Some(version) { self.pulls.clone() } else { Vec::new() }
        }

        /// R2: ends a round of a pull. `found` says what each awaited node was, after it gave all; None: no answer.
        pub fn note_received(&mut self, version: Version, pull: &Pull, found: &[(String, Option<Giver>)]) {
            if self.version() != Some(version) {
                return;
            }
            let is_incomplete = found.iter().all(|(_, found)| *found == Some(Giver::Incomplete));
            let others = self.others();
            let is_it = |it: &&mut Pull| (it.span, &it.group) == (pull.span, &pull.group);
            for it in self.pulls.iter_mut().filter(is_it) {
                it.incomplete_rounds = if is_incomplete { it.incomplete_rounds + 1 } else { 0 };
                for (node, found) in found {
                    if let Some(Giver::Whole | Giver::Restarted) = found {
                        it.received.insert(node.clone());
                    }
                    it.is_answerable |= *found == Some(Giver::Whole);
                }
                if it.is_source && it.is_done() && !it.is_answerable {
                    // No source is whole any more. What they gave until then may be at another replica alone.
                    *it = Pull { span: it.span, group: others.clone(), ..Pull::default() };
                }
            }
            self.drop_pulls(Pull::is_done);
        }

        fn drop_pulls(&mut self, is_done: impl Fn(&Pull) -> bool) {
            let had_some = !self.pulls.is_empty();
            self.pulls.retain(|pull| !is_done(pull));
            if had_some && self.pulls.is_empty() {
                self.say(format!("has everything of table {}", self.version().unwrap_or_default()));
            }
        }

        pub fn incoming(&self) -> BTreeSet<String> {
            self.pulls.iter().flat_map(Pull::awaited).cloned().collect()
        }

        // -- R3 adopt

        /// R3: adopts a newer table in one step under the lock, unless a fresh lock of another coordinator forbids it.
        /// A node that used the table's base, and is in its view or a source, keeps its records. Any other drops them,
        /// since the table does not count on them. What is stable and what replicas lack is found out anew.
        pub fn adopt(&mut self, table: Arc<Table>) -> bool {
            let other = table.version.coordinator != self.promise.version.coordinator;
            let is_forbidden = self.is_locked() && other && table.version < self.promise.version;
            if Some(table.version) <= self.version() || is_forbidden {
                return false;
            }
            let keeps = table.nodes(false).contains(&self.own) && self.version() == Some(table.base);
            if !keeps {
                // `lacking` fails for its writes in flight now: their clients get 503.
                self.in_flight.clear();
                self.drop_records(ALL);
                self.not_pulled = vec![ALL];
            }
            self.not_pulled.extend(self.pulls.iter().filter(|pull| !pull.is_answerable).map(|pull| pull.span));
            self.shard = table.shard_of(&self.own);
            let was_blank = self.table.replace(table.clone()).is_none();
            // A node that is not blank adopts only tables of view changes, for which every node of the view has granted
            // the lock.
            if !was_blank {
                table.view.iter().for_each(|node| self.note_alive(node));
            }
            self.pulls = self.pulls_by(&table);
            self.lagging.clear();
            self.others().iter().for_each(|node| self.note_lagging(node));
            self.stable_at = vec![0; table.view.len()];
            (self.watermark, self.settled) = (0, false);
            self.promise.joining = None;
            if self.promise.version <= table.version {
                self.promise = Promise { version: self.promise.version, ..Promise::default() };
            }
            let incoming = self.incoming();
            let from = if incoming.is_empty() { "nobody".into() } else { Vec::from_iter(incoming).join(", ") };
            let (version, count) = (table.version, table.view.len());
            let how = if was_blank { "started blank, " } else { "" };
            self.say(format!("{how}goes by table {version} of {count} nodes, fetches from {from}"));
            if !self.pulls.is_empty() {
                self.later.activities.push(Activity::Pull(version));
            }
            self.settle_if_all_whole();
            true
        }

        /// R3: for an owned range, pulls from each source group, answerable at once if this node is in the group and
        /// kept its records; and from the other replicas if it did not keep them. A node that joins, and has granted
        /// the lock for this table, gets all that they write by it as pushes. Where the table names sources too, which
        /// have all that was written before, it does not wait for the other replicas. (One with open pulls may own the
        /// range already. Then it lacks what the others wrote by the table before.)
        fn pulls_by(&self, table: &Table) -> Vec<Pull> {
            // `settled` is still that of the table before.
            let (mut pulls, has_joined) = (Vec::new(), self.settled && self.promise.version == table.version);
            for (span, range) in table.spans().filter(|(_, range)| Some(range.shard) == self.shard) {
                let has_it = !self.not_pulled.iter().any(|lack| lack.overlaps(&span));
                for group in &range.sources {
                    let is_answerable = has_it && group.contains(&self.own);
                    let group = self.without_own(group);
                    pulls.push(Pull { span, group, is_source: true, is_answerable, ..Pull::default() });
                }
                if !has_it && (!has_joined || range.sources.is_empty()) {
                    pulls.push(Pull { span, group: self.others(), ..Pull::default() });
                }
            }
            pulls.retain(|pull| !pull.group.is_empty());
            pulls
        }

        // -- R4 write

        /// R4: stores a client's record under a stamp above all that this node knows and the client has seen. It is in
        /// flight until no reachable replica lacks it (`lacking`).
        pub fn write(&mut self, hash: u64, mut record: Record, context: &Context) -> Record {
            let above = self.clock_now().max(context.highest());
            self.clock = ((above >> NODE_BITS) + 1) << NODE_BITS | bits_of(&self.own) as u64;
            record.set_stamp(self.clock);
            self.in_flight.insert(self.clock);
            let mut kept = context.clone();
            kept.table = self.version().filter(|_| !self.settled).max(kept.table);
            self.store_record(hash, record.clone(), kept);
            record
        }

        fn clock_now(&self) -> u64 {
            self.clock.max(stamp_at(self.now))
        }

        fn store_record(&mut self, hash: u64, record: Record, context: Context) {
            let (stamp, is_tombstone) = (record.stamp(), record.is_tombstone());
            if let Some(old) = self.records.insert(hash, record) {
                self.unstable.remove(&(old.stamp(), hash));
            }
            if is_tombstone || !context.is_empty() {
                self.unstable.insert((stamp, hash), context);
            }
        }

        /// R4: takes another node's record if it beats the one here. What is stable is here, or was deleted: it is
        /// ignored, unless it comes by a pull that still covers the key. Returns whether it was taken.
        pub fn take(&mut self, (record, context): &Copied, by_pull: bool) -> bool {
            let (hash, stamp) = (record.hash(), record.stamp());
            self.clock = self.clock.max(stamp);
            let is_old =
                stamp <= self.watermark && !(by_pull && self.pulls.iter().any(|pull| pull.span.contains(hash)));
            let is_beaten = self.records.get(hash, record.key()).is_some_and(|here| !record.beats(here));
            if is_old || is_beaten {
                return false;
            }
            let context = self.unstable_part(context);
            self.store_record(hash, record.clone(), context);
            true
        }

        /// R4: returns the reachable replicas that lack a write. If there is none, the write is in flight no longer.
        /// Silent replicas lag from now on. Fails if this node dropped the write when it adopted a table (R3). If it
        /// dropped the record since the table was settled (R8), all owners have got it, and may have deleted it since.
        pub fn lacking(&mut self, record: &Record, stored: &Stored) -> Result<Vec<String>, ()> {
            let (hash, stamp) = (record.hash(), record.stamp());
            let Some(table) = self.table.clone().filter(|_| self.in_flight.contains(&stamp)) else { return Err(()) };
            if self.records.get(hash, record.key()).is_none() {
                self.in_flight.remove(&stamp);
                return Ok(Vec::new());
            }
            let (mut lacking, mut unreached) = (Vec::new(), Vec::new());
            for node in table.owners(hash).iter().filter(|node| **node != self.own) {
                match self.peers.get(node) {
                    Some(peer) if peer.silent => unreached.push(node),
                    Some(peer) if stored.get(node) == Some(&(peer.status.incarnation, self.version())) => {}
                    _ => lacking.push(node.clone()),
                }
            }
            unreached.into_iter().for_each(|node| self.note_lagging(node));
            if lacking.is_empty() {
                self.in_flight.remove(&stamp);
            }
            Ok(lacking)
        }

        pub fn give_up(&mut self, record: &Record, lacking: &[String]) {
            lacking.iter().for_each(|node| self.note_lagging(node));
            self.in_flight.remove(&record.stamp());
        }

        fn note_lagging(&mut self, node: &str) {
            if self.is_replica(node) {
                self.lagging.insert(node.to_owned());
            }
        }

        // -- R5 reconcile

        /// R5: due if the replica may lack something or its digest differs for long. The caller calls `reconciled`. A
        /// node that has nothing yet pulls first: doing both at once, it takes up to five times as long.
        pub fn begin_to_reconcile(&mut self, node: &str) -> bool {
            let (version, is_ready, lags) = (self.version(), self.is_ready(), self.lagging.contains(node));
            let Some(peer) = self.peers.get_mut(node) else { return false };
            let can = is_ready && peer.status.is_ready && peer.status.version == version && !peer.silent;
            let differs = peer.differs.is_some_and(|since| since + DIFFERING < self.now);
            let is_due = can && (lags || differs) && !self.reconciling.contains(node);
            if is_due {
                peer.differs = None;
                self.lagging.remove(node);
                self.reconciling.insert(node.to_owned());
            }
            is_due
        }

        /// R5: the replica lags no longer if all was compared, and nothing failed and no table was adopted meanwhile. A
        /// restart is a failure too.
        pub fn reconciled(&mut self, node: &str, is_through: bool) {
            self.reconciling.remove(node);
            if !is_through {
                self.note_lagging(node);
            }
        }

        /// R5: takes records of a replica or, `by_pull`, of a source. The other replicas may lack what is new: nobody
        /// else may know that, if its writer has died. Fails if another table was adopted meanwhile.
        pub fn take_reconciled(&mut self, by: Option<Version>, from: &str, copies: &[Copied], by_pull: bool) -> bool {
            if self.version() != by {
                return false;
            }
            let mut news = false;
            for copy in copies {
                news |= self.take(copy, by_pull);
            }
            for other in self.others().iter().filter(|other| news && *other != from) {
                self.note_lagging(other);
            }
            true
        }

        /// R5: compares a span with another node's, as far as a message has room. Keys with one hash count as one.
        fn compare(&self, span: Span, theirs: Vec<(u64, u64)>) -> Reply {
            let (records, last) = self.records.first_of(span, MAX_BATCH);
            let mut theirs: BTreeMap<u64, u64> = theirs.into_iter().filter(|(hash, _)| *hash <= last).collect();
            let mut newer = Vec::new();
            for record in records {
                let (hash, stamp) = (record.hash(), theirs.get(&record.hash()).copied().unwrap_or(0));
                if stamp <= record.stamp() {
                    theirs.remove(&hash);
                }
                if stamp < record.stamp() {
                    let context = self.context_of(&record);
                    newer.push((record, context));
                }
            }
            Reply::Compared(newer, theirs.into_iter().collect(), last)
        }

        // -- R6 stability

        /// R6: raises this node's claim (`stable_at`), up to which its writes are on all replicas. It stays below what
        /// is in flight, and does not rise while a replica lags or is being reconciled with, or the table is not
        /// settled. It never falls. The watermark is the lowest claim of all nodes of the view.
        ///
        /// A node that starts again must write above the claims of its previous incarnation, which others may hear of
        /// late. So no claim exceeds the clock that any other replica has reported: the next incarnation pulls from one
        /// of these first, and so knows its clock. (Without other replicas there is no need: others take its records by
        /// pulls only, and these ignore the watermark.)
        fn refresh_stable(&mut self) {
            self.settle_if_all_whole();
            let Some(table) = self.table.clone().filter(|_| self.settled) else { return };
            let own = table.view.iter().position(|node| *node == self.own);
            let has_all = self.pulls.is_empty() && self.lagging.is_empty() && self.reconciling.is_empty();
            if let Some(own) = own.filter(|_| has_all) {
                let in_flight = self.in_flight.first().map(|stamp| stamp - 1);
                let clock_of = |node: String| self.peers.get(&node).map_or(0, |peer| peer.status.clock);
                let clocks = self.others().into_iter().map(clock_of);
                self.stable_at[own] = clocks.chain(in_flight).fold(self.clock_now(), u64::min).max(self.stable_at[own]);
            }
            self.watermark = self.stable_at.iter().copied().min().unwrap_or(0);
        }

        /// R6: drops stable tombstones and contexts, up to 2,000. Returns whether there may be more.
        pub fn drop_stable(&mut self) -> bool {
            self.refresh_stable();
            for _ in 0..2000 {
                let Some(entry) = self.unstable.first_entry().filter(|it| it.key().0 <= self.watermark) else {
                    return false;
                };
                let ((stamp, hash), _) = entry.remove_entry();
                self.records.remove_tombstone(hash, stamp);
            }
            true
        }

        // -- R7 causal contexts

        fn context_of(&self, record: &Record) -> Context {
            self.unstable.get(&(record.stamp(), record.hash())).cloned().unwrap_or_default()
        }

        /// R7: a context without what is stable. For nodes that the table does not name, the highest stamp is enough.
        pub fn unstable_part(&self, context: &Context) -> Context {
            let table = context.table.filter(|it| Some(*it) > self.version() || !self.settled);
            let (mut kept, mut unknown) = (Context { table, ..Context::default() }, None);
            for stamp in context.seen.values().filter(|stamp| **stamp > self.watermark) {
                if self.nodes_with(node_of(*stamp)).is_empty() {
                    unknown = unknown.max(Some(*stamp));
                } else {
                    kept.add(*stamp);
                }
            }
            unknown.into_iter().for_each(|stamp| kept.add(stamp));
            kept
        }

        fn nodes_with(&self, bits: u16) -> Vec<&String> {
            let nodes = self.table.iter().flat_map(|table| table.nodes(self.settled));
            nodes.filter(|name| bits_of(name) == bits).collect()
        }

        /// A forged stamp must not advance this node's clock. Real clocks differ by less than an hour.
        pub fn is_plausible(&self, context: &Context) -> bool {
            context.highest() <= stamp_at(self.now + Duration::from_secs(3600)).max(self.clock)
        }

        /// R7: the groups of which a node must give a key before a read by this context is answered. The context names
        /// a node and a stamp given there. Unless that write is stable, or older than the record here, it may be to
        /// this key, so that node is asked. None: the context names a newer table.
        pub fn context_needs(&self, hash: u64, key: &[u8], context: &Context) -> Option<Vec<Vec<String>>> {
            let table = self.table.as_ref().filter(|table| context.table <= Some(table.version))?;
            let here = self.records.get(hash, key).map_or(0, Record::stamp);
            let others = self.others();
            let sources = &table.range_at(hash).sources;
            let restarted = self.pulls.iter().any(|pull| !pull.is_source && pull.span.contains(hash));
            let mut needs: Vec<Vec<String>> = Vec::new();
            for stamp in context.seen.values().filter(|stamp| **stamp > self.watermark.max(here)) {
                let writers = self.nodes_with(node_of(*stamp));
                // Of its own writes before a restart, this node knows no more than of an unknown node's.
                let may_lack_own = writers.contains(&&self.own) && restarted;
                if writers.is_empty() || may_lack_own {
                    needs.extend(others.iter().map(|other| vec![other.clone()]));
                }
                let is_source = |node: &String| !self.settled && sources.iter().flatten().any(|it| it == node);
                let asked =
                    writers.into_iter().filter(|node| **node != self.own && (others.contains(node) || is_source(node)));
                needs.extend(asked.map(|node| vec![node.clone()]));
            }
            if !needs.is_empty() {
                needs.extend(self.pulls.iter().filter(|pull| pull.span.contains(hash)).map(|pull| pull.group.clone()));
            }
            needs.sort_unstable();
            needs.dedup();
            Some(needs)
        }

        pub fn context_after(&mut self, context: &Context, record: Option<&Record>) -> Context {
            let mut after = context.clone();
            self.clock = self.clock.max(context.highest());
            if let Some(record) = record {
                after.merge(&self.context_of(record));
                after.add(record.stamp());
            }
            after.table = after.table.max(self.version().filter(|_| !self.settled));
            self.refresh_stable();
            self.unstable_part(&after)
        }

        // -- R8 settled

        /// R8: all nodes of the view use this table, without pulls. Sources are not needed: a pull ends only when each
        /// has answered by this version or has nothing. What is not owned is dropped. A source that has not heard of
        /// this keeps its records, and may join only once it has heard (`check_joining`).
        pub fn settle(&mut self) {
            if std::mem::replace(&mut self.settled, true) {
                return;
            }
            self.drop_pulls(|pull| pull.is_source);
            self.not_pulled.clear();
            let (Some(table), own) = (self.table.clone(), self.shard) else { return };
            table.spans().filter(|(_, range)| Some(range.shard) != own).for_each(|(span, _)| self.drop_records(span));
        }

        fn settle_if_all_whole(&mut self) {
            let Some(table) = self.table.as_ref().filter(|_| self.pulls.is_empty()) else { return };
            let has_finished =
                |node: &String| self.peers.get(node).is_some_and(|peer| peer.status.is_whole_by(table.version));
            if table.view.iter().all(|node| *node == self.own || has_finished(node)) {
                self.settle();
            }
        }

        // -- Meetings (R11)

        pub fn status(&mut self) -> Status {
            self.refresh_stable();
            let sums = self.sums();
            // A node that has heard of a table does not adopt a first one.
            let may_begin = self.table.is_none() && self.heard_of.is_none() && self.rounds >= MIN_ROUNDS;
            let mut promised = self.promise.version;
            let mut asked = BTreeSet::from_iter(self.promise.asked.values().flatten());
            if let Some(heard) = self.heard_of.as_ref().filter(|heard| heard.version > promised) {
                // Other blank nodes must ask its nodes too.
                (promised, asked) = (heard.version, heard.nodes(false));
            }
            Status {
                incarnation: self.incarnation,
                version: self.version(),
                store: self.table.as_ref().map_or(0, |table| table.store),
                settled: self.settled,
                members: self.table.as_ref().filter(|_| self.shard.is_some()).map_or(0, |table| table.view.len()),
                keys: sums.count,
                digest: sums.digest,
                is_whole: self.pulls.is_empty(),
                is_ready: self.is_ready(),
                clock: self.clock_now(),
                promised,
                asked_for_lock: asked.into_iter().cloned().collect(),
                stable_at: self.stable_at.clone(),
                first: if may_begin { self.first.store } else { 0 },
            }
        }

        /// Whether this node can answer for all that it owns without asking others.
        pub fn is_ready(&self) -> bool {
            self.table.is_some() && self.pulls.iter().all(|pull| pull.is_answerable)
        }

        pub fn compose(&self, to: &str, message: Message) -> Envelope {
            let to_incarnation = self.incarnation_of(to);
            let (from, to, incarnation) = (self.own.clone(), to.to_owned(), self.incarnation);
            Envelope { from, to, version: self.version(), incarnation, to_incarnation, message }
        }

        pub fn incarnation_of(&self, node: &str) -> u64 {
            self.peers.get(node).map_or(0, |peer| peer.status.incarnation)
        }

        pub fn receive(&mut self, envelope: Envelope) -> Reply {
            let Envelope { from, version, incarnation, to_incarnation, message, .. } = envelope;
            // Records are exchanged by one table, and within one incarnation of each node.
            let is_current = to_incarnation == self.incarnation && incarnation == self.incarnation_of(&from);
            let is_same = version.is_some() && version == self.version() && is_current;
            match message {
                Message::Meet(status) => {
                    self.receive_meeting(from, &status);
                    self.met(version)
                }
                Message::Lock(lock, nodes) => {
                    self.grant(&from, lock, nodes);
                    self.met(version)
                }
                Message::Survey(version, counts) if self.promise.version == version => self.survey(&counts),
                Message::GiveKey(key, for_context) if is_same => self.give_key(&key, for_context),
                Message::Digests(span) if is_same && span.first <= span.last => {
                    // R2: what is written from now on may be missing in the digests.
                    self.note_alive(&from);
                    Reply::Digests(self.records.digests_of(span), self.is_whole_for(span))
                }
                Message::Compare(span, theirs) if is_same => self.compare(span, theirs),
                Message::Push(copy) if is_same => {
                    self.take(&copy, false);
                    Reply::Done
                }
                Message::Give(copies) if is_same => {
                    self.take_reconciled(version, &from, &copies, false);
                    Reply::Done
                }
                _ => Reply::Refused,
            }
        }

        fn receive_meeting(&mut self, from: String, status: &Status) {
            if self.table.is_none() {
                // The other one learns that there is nothing to pull here. From now on writes must reach it, as if it
                // had begun to pull.
                self.note_alive(&from);
            }
            self.hear(&from, status);
            // A reply tells which incarnation is alive, and has the newer table.
            if status.incarnation != self.incarnation_of(&from) || status.version > self.version() {
                self.later.activities.push(Activity::Meet(from));
            }
        }

        fn met(&mut self, version: Option<Version>) -> Reply {
            let newer = self.table.as_deref().filter(|table| Some(table.version) > version).cloned();
            Reply::Met(Box::new(self.status()), newer)
        }

        /// R11: notes the incarnation of a node that replied to a question. Only replies count, and only to questions
        /// that began after the known incarnation first replied: anything else may be from an earlier one.
        ///
        /// From now on pushes of earlier incarnations are refused (`receive`). The present one does not have these
        /// writes in flight, so its claim may rise above them. A replica that took one later would keep a record that
        /// others ignore as stable.
        pub fn note_incarnation(&mut self, node: &str, incarnation: u64, began: Duration) {
            let (now, peer) = (self.now, self.peers.entry(node.to_owned()).or_default());
            if incarnation != peer.status.incarnation && began >= peer.replied_since {
                (peer.status.incarnation, peer.replied_since) = (incarnation, now);
                self.note_lagging(node);
            }
        }

        /// Believes what a node reports of itself, if it is of the incarnation that last replied.
        pub fn hear(&mut self, from: &str, status: &Status) {
            if from == self.own || status.incarnation != self.incarnation_of(from) {
                return;
            }
            self.clock = self.clock.max(status.clock);
            let is_same = status.version == self.version();
            // This node's own claim too: others may know it of its earlier incarnation. (Where all members start again,
            // their first table has the same version.)
            if is_same && status.members > 0 {
                for (known, told) in self.stable_at.iter_mut().zip(&status.stable_at) {
                    *known = (*known).max(*told);
                }
                if status.settled {
                    self.settle();
                }
            }
            let is_decided = !self.is_locked() && status.version != Some(self.promise.version);
            if self.promise.joining.as_deref() == Some(from) && is_decided {
                self.promise.joining = None;
            }
            let are_ready = is_same && self.is_replica(from) && status.is_ready && self.is_ready();
            let differs = are_ready && status.digest != self.sums().digest;
            let peer = self.peers.entry(from.to_owned()).or_default();
            peer.status = status.clone();
            peer.differs = if differs { peer.differs.or(Some(self.now)) } else { None };
            self.refresh_stable();
        }

        /// From now on, writes must reach this node: it has begun to pull, or granted the lock for a table.
        fn note_alive(&mut self, node: &str) {
            self.peers.entry(node.to_owned()).or_default().alive_at = self.now;
            self.note_answer(node, self.now, true);
        }

        /// Notes whether a node answered a question. If not it is silent, unless it was known to be alive after the
        /// question `began`, which may have been sent to its previous incarnation.
        pub fn note_answer(&mut self, node: &str, began: Duration, has_answered: bool) {
            let peer = self.peers.entry(node.to_owned()).or_default();
            let silent = !has_answered;
            if silent && peer.alive_at >= began {
                return;
            }
            let has_changed = std::mem::replace(&mut peer.silent, silent) != silent;
            if has_changed && self.members().iter().any(|it| it == node) {
                self.say(format!("{node} is {}", if silent { "silent" } else { "back" }));
            }
        }

        pub fn is_silent(&self, node: &str) -> bool {
            self.peers.get(node).is_some_and(|peer| peer.silent)
        }

        /// The silent members; of a blank node, the silent nodes that it asks.
        pub fn silent(&self) -> Vec<String> {
            let nodes = if self.table.is_none() { self.nodes_to_ask() } else { self.members() };
            nodes.into_iter().filter(|node| self.is_silent(node)).collect()
        }

        /// Whether this store of one node, without keys, may join another.
        fn is_alone(&self) -> bool {
            let is_one = self.table.as_ref().is_some_and(|table| table.view == [self.own.as_str()]);
            is_one && self.records.total().count == 0 && self.pulls.is_empty()
        }

        pub fn hear_of_table(&mut self, from: &str, table: Arc<Table>) {
            if !table.is_valid() {
                return;
            }
            let Some(mine) = &self.table else {
                let names_it = table.nodes(false).contains(&self.own);
                // The store's id tells a node that was left out while all nodes of its `VIEW` were blank.
                let is_ours = names_it || self.first.lists(from) || table.store == self.first.store;
                if is_ours && self.heard_of.as_ref().is_none_or(|it| it.version < table.version) {
                    self.heard_of = Some(table);
                }
                return;
            };
            let has_left = !mine.lists(&self.own);
            let joins = (self.is_alone() || has_left) && table.lists(&self.own);
            // A node that has left a store adopts what that store's nodes use.
            let follows = has_left && mine.lists(from);
            if mine.store == table.store || joins || follows {
                self.adopt(table);
            }
        }

        /// R11: meets a neighbour, a replica, at times another node, and one that is silent or blank, or has left: so
        /// an idle store costs in proportion to its nodes. A blank node returns all nodes to ask instead (R10).
        pub fn begin_round(&mut self) -> Option<Vec<String>> {
            self.rounds = self.rounds.saturating_add(1);
            if self.table.is_none() {
                return Some(self.nodes_to_ask());
            }
            let members = self.members();
            let in_turn = |nodes: &[String], round: u32| nodes.get(round as usize % nodes.len().max(1)).cloned();
            let is_missed = |peer: &Peer| peer.silent || peer.status.version.is_none();
            let (missed, met): (Vec<String>, Vec<String>) =
                members.iter().cloned().partition(|it| self.peers.get(it).is_none_or(is_missed));
            // The next node by name. So each has one that notices when it starts again.
            let neighbour = met.partition_point(|it| *it < self.own);
            let mut chosen = BTreeSet::from_iter(in_turn(&met, neighbour as u32));
            chosen.extend(in_turn(&self.others(), self.rounds));
            chosen.extend(in_turn(&missed, self.rounds));
            if self.rounds.is_multiple_of(2) {
                chosen.extend(in_turn(&members, self.rounds / 2));
                // Nodes that left may be gone for good: no member waits for its turn behind them.
                let left = self.without_own(self.table.iter().flat_map(|table| &table.left));
                chosen.extend(in_turn(&left, self.rounds / 2));
            }
            chosen.extend(self.promise.joining.clone());
            self.later.activities.extend(chosen.into_iter().map(Activity::Meet));
            None
        }

        // -- R10 start

        fn nodes_to_ask(&self) -> Vec<String> {
            let mut all = BTreeSet::from_iter(&self.first.view);
            all.extend(self.promise.asked.values().flatten());
            all.extend(self.peers.values().flat_map(|peer| &peer.status.asked_for_lock));
            if let Some(table) = &self.heard_of {
                let goes_by_it = |(_, peer): &(&String, &Peer)| peer.status.version == Some(table.version);
                all.extend(table.nodes(false));
                all.extend(self.peers.iter().filter(goes_by_it).map(|(node, _)| node));
            }
            self.without_own(all)
        }

        /// R10: a blank node adopts the newest table that it has heard of if no answering node of that store uses a
        /// newer one, and
        /// - more than half of the table's other members answered, and no answer tells of a lock for a newer table,
        ///   which may be in force elsewhere; or
        /// - all nodes that it asks answered, among them those that were asked for the lock, and members of a newer
        ///   table have had a second to find this node.
        ///
        /// If it has heard of no table, it adopts the first one once all nodes of its `VIEW` are blank too
        /// (`first_table`).
        pub fn take_up_table(&mut self, answers: &BTreeMap<String, Status>) {
            // Asked anew: the answers of this round may have named more nodes.
            let has_all = self.nodes_to_ask().iter().all(|node| answers.contains_key(node));
            // A table that no answering node uses may be lost with all nodes that did.
            let is_alive = |table: &Arc<Table>| answers.values().any(|status| status.version == Some(table.version));
            let had_heard = self.heard_of.is_some();
            self.heard_of = self.heard_of.take().filter(is_alive);
            if had_heard && self.heard_of.is_none() {
                // The answer of its last node may have got lost: the first table waits for another second.
                self.rounds = 0;
            }
            let table = match self.heard_of.clone() {
                Some(table) => {
                    let others: Vec<&String> = table.view.iter().filter(|node| **node != self.own).collect();
                    let answered = others.iter().filter(|node| answers.contains_key(**node)).count();
                    let knows_no_newer = |it: &Status| it.promised <= table.version || it.asked_for_lock.is_empty();
                    let is_majority = 2 * answered > others.len() && answers.values().all(knows_no_newer);
                    let are_all = has_all && self.rounds >= MIN_ROUNDS;
                    let is_newest =
                        answers.values().all(|it| it.store != table.store || it.version <= Some(table.version));
                    let is_enough = is_majority && self.may_go_by(&table) || are_all;
                    Some(table).filter(|_| is_newest && is_enough)
                }
                None => self.first_table(answers),
            };
            let Some(table) = table else { return self.say_why_it_waits(answers) };
            if self.adopt(table) {
                self.heard_of = None;
                // If it is settled, nothing is pulled from sources (R8), which may still have what was deleted since.
                answers.iter().for_each(|(node, status)| self.hear(node, status));
            }
        }

        fn first_table(&self, answers: &BTreeMap<String, Status>) -> Option<Arc<Table>> {
            let first = self.first.clone();
            let others: Vec<&String> = first.view.iter().filter(|node| **node != self.own).collect();
            let are_up = others.iter().all(|node| answers.get(*node).is_some_and(|it| it.first == first.store));
            let is_first = are_up && first.lists(&self.own) && self.rounds >= MIN_ROUNDS;
            is_first.then_some(first)
        }

        /// Says every ten seconds why this node is still blank.
        fn say_why_it_waits(&mut self, answers: &BTreeMap<String, Status>) {
            if !self.rounds.is_multiple_of(40) {
                return;
            }
            let (view, store) = (&self.first.view, self.first.store);
            let differs = |node: &&String| answers.get(*node).is_some_and(|it| it.first != 0 && it.first != store);
            let differing = view.iter().find(differs).filter(|_| self.heard_of.is_none()).cloned();
            if let Some(node) = differing {
                self.say(format!("waits: {node} was started with another VIEW or REPL_FACTOR"));
            }
            let silent = self.silent();
            if !silent.is_empty() {
                self.say(format!("waits: no answer from {}", silent.join(", ")));
            }
        }

        // -- R9 view change, at the locked nodes

        fn is_locked(&self) -> bool {
            self.promise.granted.is_some_and(|granted| self.now < granted + self.lease)
        }

        /// R9: grants a lock above every table and lock known here, unless another coordinator's lock is fresh. Without
        /// nodes, releases the lock if it was granted.
        fn grant(&mut self, from: &str, version: Version, nodes: Vec<String>) {
            let (is_release, before) = (nodes.is_empty(), self.promise.version);
            let is_above = !is_release && Some(version) > self.version() && version > before;
            let is_excluded = self.is_locked() && before.coordinator != version.coordinator;
            if is_excluded || !(is_above || version == before) {
                return;
            }
            let may_join = !is_release && self.is_alone() && from != self.own;
            self.promise.version = version;
            self.promise.asked.insert(version, nodes);
            self.promise.asked.retain(|_, nodes| !nodes.is_empty());
            self.promise.granted = Some(self.now).filter(|_| !is_release);
            self.promise.joining = may_join.then(|| from.to_owned());
        }

        fn survey(&self, counts: &[usize]) -> Reply {
            let spans = self.own_spans();
            let cuts = counts.iter().map(|count| self.records.cut_above(&spans, (*count).max(1))).collect();
            let few = self.sums().count <= MAX_FEW;
            let hashes = few.then(|| spans.iter().flat_map(|span| self.records.hashes_of(*span)).collect());
            Reply::Surveyed(cuts, hashes)
        }

        /// R9: the base of a change, and its version: above every table and lock that this node knows of, in a new
        /// epoch if silent nodes are left out. None if it coordinates a change already.
        pub fn begin_change(&mut self, view: &[String], force: bool) -> Option<(Arc<Table>, Version)> {
            let table = self.table.clone().filter(|_| !self.coordinating)?;
            self.coordinating = true;
            let of_peer = |peer: &Peer| peer.status.promised.max(peer.status.version.unwrap_or_default());
            let of_peers = self.peers.values().map(of_peer).max().unwrap_or_default();
            // Forgets nodes that earlier attempts named and that did not join.
            let members = BTreeSet::from_iter(self.members());
            self.peers.retain(|node, _| members.contains(node));
            let newest = table.version.max(self.promise.version).max(of_peers);
            let leaves_out = force || self.silent().iter().any(|node| !view.contains(node));
            let epoch = newest.epoch.saturating_add(u64::from(leaves_out && newest.epoch == table.version.epoch));
            Some((table, Version { epoch, number: newest.number.saturating_add(1), coordinator: self.incarnation }))
        }

        /// R9: the change itself: the coordinator adopts its table, while its lock is the highest here. All nodes
        /// granted theirs after the change `began`, so they are fresh for 10 s from then on. It uses 8 s.
        pub fn adopt_own(&mut self, table: Arc<Table>, began: Duration) -> bool {
            let is_fresh = self.now < began + self.lease * 4 / 5;
            self.promise.version == table.version && is_fresh && table.is_valid() && self.adopt(table)
        }

        /// A node that this one waits for, to be named in an error.
        pub fn missing(&self) -> String {
            let joining = self.promise.joining.iter().cloned();
            let mut all = joining.chain(self.silent()).chain(self.nodes_to_ask());
            all.next().unwrap_or_else(|| self.own.clone())
        }
    }
}

// ---- Replication: what a node does over time with records -----------------------------------------------------------

mod replication {
    //! What a node does over time with records. `Node` decides under its lock; this module sends the messages, and
    //! repeats what failed. Begin with the trait `World`, then read `replicate` (R4), `pull_all` (R2) and `reconcile`
    //! (R5). The functions are async only for the simulation, which runs many at once and decides the fate of each
    //! message. In the program each wait blocks its coroutine or thread, and `block_on` polls once.

    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::Arc;
    use std::time::Duration;

    use serde_bytes::ByteBuf;

    use crate::http::{Answer, Request};
    use crate::membership::meet;
    use crate::node::{Envelope, Giver, MAX_BATCH, Message, Node, Pull, Reply};
    use crate::records::{Record, Span};
    use crate::table::Version;

    /// A node's access to its own state, to other instances, and to time.
    pub trait World {
        fn with<T>(&self, action: impl FnOnce(&mut Node) -> T) -> T;
        /// Sends messages side by side. None for each that got no answer in time.
        fn deliver(&self, envelopes: Vec<Envelope>) -> impl Future<Output = Vec<Option<Reply>>>;
        fn relay(&self, node: &str, request: Request, patience: Duration)
        -> impl Future<Output = Result<Answer, Lost>>;
        fn sleep(&self, time: Duration) -> impl Future<Output = ()>;
    }

    #[derive(Clone, Copy)]
    pub struct Lost {
        /// The request may have arrived and taken effect.
        pub was_sent: bool,
    }

    /// The number of messages in flight at a time, however large the view is.
    const SIDE_BY_SIDE: usize = 16;

    /// The most adjacent buckets compared as one span. More would leave too few spans to compare side by side.
    const BUCKETS_IN_PART: usize = 128;

    /// Sends each node a message. A node that does not answer is silent from then on.
    pub async fn ask_each(world: &impl World, messages: Vec<(String, Message)>) -> Vec<Option<Reply>> {
        let mut replies = Vec::new();
        for group in messages.chunks(SIDE_BY_SIDE) {
            let compose = |node: &mut Node| group.iter().map(|(to, it)| node.compose(to, it.clone())).collect();
            let (began, envelopes): (Duration, Vec<Envelope>) = world.with(|node| (node.now, compose(node)));
            let incarnations: Vec<u64> = envelopes.iter().map(|envelope| envelope.to_incarnation).collect();
            let mut answers = world.deliver(envelopes).await;
            world.with(|node| {
                for (((name, _), answer), incarnation) in group.iter().zip(&mut answers).zip(incarnations) {
                    node.note_answer(name, began, answer.is_some());
                    if let Some(Reply::Met(status, table)) = answer {
                        if let Some(table) = table.take() {
                            node.hear_of_table(name, Arc::new(table));
                        }
                        // After the table was adopted: the status may say that it is settled (R8).
                        node.note_incarnation(name, status.incarnation, began);
                        node.hear(name, status);
                        node.note_meeting(name, began);
                    } else if node.incarnation_of(name) != incarnation {
                        // The node has restarted since, and lost what it had.
                        *answer = None;
                    }
                }
            });
            replies.extend(answers);
        }
        replies
    }

    pub async fn ask(world: &impl World, nodes: &[String], message: Message) -> Vec<Option<Reply>> {
        ask_each(world, nodes.iter().map(|node| (node.clone(), message.clone())).collect()).await
    }

    /// A node that uses another table refuses. Then the two meet, and the older table gives way.
    async fn ask_by(world: &impl World, node: &str, version: Version, message: Message) -> Option<Reply> {
        if world.with(|node| node.version()) != Some(version) {
            return None;
        }
        match ask(world, &[node.to_owned()], message).await.pop()?? {
            Reply::Refused => {
                meet(world, node).await;
                None
            }
            reply => Some(reply),
        }
    }

    /// R4: pushes a record to all replicas that are not silent, also to those of a table adopted meanwhile; only then
    /// may the write be acknowledged. Silent ones are lagging until they are reconciled with. Fails with a node that
    /// did not take it in time: the write is not undone, but its client gets the error.
    pub async fn replicate(world: &impl World, record: &Record, deadline: Duration) -> Result<(), String> {
        let (mut stored, mut blank) = (BTreeMap::new(), Vec::new());
        loop {
            let (version, lacking, late) =
                world.with(|node| (node.version(), node.lacking(record, &stored), node.now > deadline));
            let Ok(lacking) = lacking else { return Err(world.with(|node| node.own().to_owned())) };
            let Some(first) = lacking.first() else { return Ok(()) };
            // All others have the record (`lacking`), so a replica that is blank pulls it from one of them.
            if late || lacking == blank {
                world.with(|node| node.give_up(record, &lacking));
                return if late { Err(first.clone()) } else { Ok(()) };
            }
            blank.clear();
            let (copy, incarnations) = world.with(|own| {
                // If one starts again meanwhile, `ask` returns None.
                let incarnations: Vec<u64> = lacking.iter().map(|node| own.incarnation_of(node)).collect();
                (own.copy_of(record), incarnations)
            });
            let replies = ask(world, &lacking, Message::Push(copy)).await;
            let refused = replies.iter().any(|reply| matches!(reply, Some(Reply::Refused)));
            for ((node, reply), incarnation) in lacking.iter().zip(replies).zip(incarnations) {
                if let Some(Reply::Done) = reply {
                    stored.insert(node.clone(), (incarnation, version));
                } else if reply.is_some() && meet(world, node).await.is_some_and(|status| status.version.is_none()) {
                    blank.push(node.clone());
                }
            }
            if refused {
                world.sleep(Duration::from_millis(2)).await;
            }
        }
    }

    /// R2: pulls by reconciling in one direction with each node of a group, so an interrupted pull goes on where
    /// digests differ. The span is answerable when a whole node has given all. The pull goes on with the others, which
    /// may have a write that the whole one lacks, and asks again those that are not whole (`Pull::is_done`). Sources
    /// keep their records until R8: the contract lets an owner that is killed before that come back with these.
    pub async fn pull_all(world: &impl World, version: Version) {
        let mut pause = 2;
        loop {
            let pulls = world.with(|node| node.pulls_left(version));
            if pulls.is_empty() {
                return;
            }
            for pull in pulls {
                let mut round = Vec::new();
                for node in pull.awaited() {
                    let is_silent = world.with(|own| own.is_silent(node));
                    let found = if is_silent { None } else { pull_from(world, version, &pull, node).await };
                    round.push((node.clone(), found));
                }
                world.with(|own| own.note_received(version, &pull, &round));
            }
            // The others refuse until they know this incarnation, which takes a meeting.
            pause = (2 * pause).min(100);
            world.sleep(Duration::from_millis(pause)).await;
        }
    }

    /// None if the node does not answer.
    async fn pull_from(world: &impl World, version: Version, pull: &Pull, node: &str) -> Option<Giver> {
        if let Some(is_whole) = reconcile(world, node, version, pull.span, true).await {
            return Some(if is_whole { Giver::Whole } else { Giver::Incomplete });
        }
        let store = world.with(|own| own.store());
        meet(world, node).await.filter(|status| status.store != store).map(|_| Giver::Restarted)
    }

    /// R1, R7: merges a key from a node of a group that may give it. Returns the version used; None if none does.
    pub async fn get_key(world: &impl World, key: &[u8], group: &[String], for_context: bool) -> Option<Version> {
        let version = world.with(|node| node.version())?;
        // Silent ones come last. One of them may be back, but trying all would take too long.
        let nodes = world.with(|own| own.ranked(group.to_vec()));
        let answering = world.with(|own| nodes.iter().filter(|node| !own.is_silent(node)).count());
        for node in nodes.into_iter().take(answering.max(1)) {
            let message = Message::GiveKey(ByteBuf::from(key), for_context);
            if let Some(Reply::Key(copy)) = ask_by(world, &node, version, message).await {
                let copies = Vec::from_iter(copy);
                let is_taken = world.with(|own| own.take_reconciled(Some(version), &node, &copies, true));
                return Some(version).filter(|_| is_taken);
            }
        }
        None
    }

    pub async fn reconcile_if_due(world: &impl World, other: &str) {
        if !world.with(|node| node.begin_to_reconcile(other)) {
            return;
        }
        let (version, spans) = world.with(|node| (node.version().unwrap_or_default(), node.own_spans()));
        let mut is_through = true;
        for span in spans {
            is_through = is_through && reconcile(world, other, version, span, false).await.is_some();
        }
        world.with(|node| node.reconciled(other, is_through));
    }

    /// R5: finds what differs by digests of buckets, then by stamps. Takes what is newer there and, except in a pull,
    /// gives what is newer here: the higher stamp wins wherever two meet. Returns whether the other node was whole
    /// for the span when it sent its digests: it may get records too late to give them. None if it could not finish.
    async fn reconcile(world: &impl World, other: &str, version: Version, span: Span, is_pull: bool) -> Option<bool> {
        let message = Message::Digests(span);
        let Reply::Digests(theirs, is_whole) = ask_by(world, other, version, message).await? else { return None };
        let ours = world.with(|node| node.records.digests_of(span));
        let buckets = span.by_bucket().zip(ours.iter().zip(&theirs));
        let differing: Vec<Span> = buckets.filter(|(_, (ours, theirs))| ours != theirs).map(|(span, _)| span).collect();
        // One message has room for several small buckets.
        let mut parts = Vec::new();
        for neighbours in differing.chunk_by(|one, next| one.last + 1 == next.first) {
            let span_of = |some: &[Span]| Span { first: some[0].first, last: some[some.len() - 1].last };
            parts.extend(neighbours.chunks(BUCKETS_IN_PART).map(span_of));
        }
        while !parts.is_empty() {
            let group = parts.split_off(parts.len().saturating_sub(SIDE_BY_SIDE));
            parts.extend(exchange(world, other, version, group, is_pull).await?);
        }
        Some(is_whole)
    }

    /// Returns the parts of the spans for which messages had no room.
    async fn exchange(
        world: &impl World,
        other: &str,
        version: Version,
        parts: Vec<Span>,
        is_pull: bool,
    ) -> Option<Vec<Span>> {
        // Each under its own lock, so that none is held for long.
        let ours: Vec<(Vec<Record>, u64)> =
            parts.iter().map(|part| world.with(|node| node.records.first_of(*part, MAX_BATCH))).collect();
        let mut messages = Vec::new();
        for (part, (records, last)) in parts.iter().zip(&ours) {
            let listed = records.iter().map(|record| (record.hash(), record.stamp())).collect();
            messages.push((other.to_owned(), Message::Compare(Span { first: part.first, last: *last }, listed)));
        }
        let (replies, mut left) = (ask_each(world, messages).await, Vec::new());
        for ((part, (records, _)), reply) in parts.iter().zip(ours).zip(replies) {
            let Reply::Compared(theirs, wanted, last) = reply? else { return None };
            if !world.with(|node| node.take_reconciled(Some(version), other, &theirs, is_pull)) {
                return None;
            }
            let wanted = BTreeSet::from_iter(wanted);
            let is_wanted = |record: &Record| wanted.contains(&(record.hash(), record.stamp()));
            let newer: Vec<Record> = records.into_iter().filter(|record| !is_pull && is_wanted(record)).collect();
            if !newer.is_empty() {
                let copies = world.with(|node| newer.iter().map(|record| node.copy_of(record)).collect());
                let Reply::Done = ask_by(world, other, version, Message::Give(copies)).await? else { return None };
            }
            if last < part.last {
                left.push(Span { first: last + 1, last: part.last });
            }
        }
        Some(left)
    }
}

// ---- Membership: starting, meeting, changing the view ---------------------------------------------------------------

mod membership {
    //! What a node does over time with other nodes. `Node` decides what to grant, adopt and believe; `table` computes a
    //! new table. Questions of clients that need other nodes, about counts and shards, are answered here too. Begin
    //! with `keep_in_touch` (R10, R11), then read `change_view` (R9) and `Attempt::run`.

    use std::collections::BTreeMap;
    use std::sync::Arc;
    use std::time::Duration;

    use serde_json::json;

    use crate::http::{Answer, Origin, Outcome, Request, Vocabulary};
    use crate::node::{Activity, Message, Reply, Status};
    use crate::peers::PATIENCE;
    use crate::records::Span;
    use crate::replication::{World, ask, ask_each, pull_all, reconcile_if_due};
    use crate::service::{WantedView, id_of};
    use crate::table::{Change, Cut, Move, Table, Version};
    use crate::world::CHANGE_LIMIT;

    pub async fn run(world: impl World, activity: Activity) {
        match activity {
            Activity::Meet(node) => {
                if meet(&world, &node).await.is_some() {
                    reconcile_if_due(&world, &node).await;
                }
            }
            Activity::Pull(version) => pull_all(&world, version).await,
        }
    }

    /// Must be called several times a second.
    pub async fn keep_in_touch(world: &impl World) {
        while world.with(|node| node.drop_stable()) {
            // A thread that locks again at once would keep other threads waiting.
            world.sleep(Duration::from_millis(1)).await;
        }
        if let Some(nodes) = world.with(|node| node.begin_round()) {
            let replies = meet_all(world, &nodes).await;
            let answers = nodes.into_iter().zip(replies).filter_map(|(node, reply)| Some((node, reply?))).collect();
            world.with(|node| node.take_up_table(&answers));
        }
    }

    /// None if the node does not answer.
    pub async fn meet(world: &impl World, other: &str) -> Option<Status> {
        meet_all(world, &[other.to_owned()]).await.pop()?
    }

    pub async fn meet_all(world: &impl World, nodes: &[String]) -> Vec<Option<Status>> {
        let message = Message::Meet(world.with(|node| node.status()));
        let replies = ask(world, nodes, message).await;
        let status = |reply| if let Some(Reply::Met(status, _)) = reply { Some(*status) } else { None };
        replies.into_iter().map(status).collect()
    }

    pub async fn await_table(world: &impl World) -> Result<(), Outcome> {
        let deadline = world.with(|node| node.now) + PATIENCE;
        while !world.with(|node| node.may_answer()) {
            if world.with(|node| node.now) > deadline {
                return Err(Outcome::NodeDown(world.with(|node| node.missing())));
            }
            world.sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    pub async fn count_keys(world: &impl World) -> Result<Outcome, Outcome> {
        await_table(world).await?;
        let (count, shard) = world.with(|node| (node.sums().count, node.shard.filter(|_| !node.own().is_empty())));
        Ok(Outcome::KeyCount(match shard {
            Some(shard) => json!({"key-count": count, "shard-id": id_of(shard)}),
            None => json!({"key-count": count}),
        }))
    }

    pub async fn describe_shards(world: &impl World, id: Option<&str>) -> Result<Outcome, Outcome> {
        await_table(world).await?;
        let table = world.with(|node| node.table()).ok_or(Outcome::NoShard)?;
        let ids: Vec<String> = (0..table.shards.len()).map(id_of).collect();
        let Some(id) = id else { return Ok(Outcome::Shards(json!({"shards": ids}))) };
        let index = ids.iter().position(|it| it.as_str() == id).ok_or(Outcome::NoShard)?;
        let replicas = &table.shards[index];
        for node in world.with(|node| node.ranked(replicas.clone())) {
            // A blank one has no keys yet.
            let status = meet(world, &node).await.filter(|status| status.version.is_some());
            if let Some(Status { keys, .. }) = status {
                let shard = json!({"shard-id": id, "key-count": keys, "replicas": replicas});
                return Ok(Outcome::Shard(shard));
            }
        }
        Err(Outcome::NodeDown(replicas[0].clone()))
    }

    /// R9: changes the view, here or at a better coordinator. If that one falls silent, the request may be repeated.
    pub async fn answer_view_change(world: &impl World, request: &Request, wanted: &WantedView) -> Answer {
        let render = |outcome: Outcome| outcome.answer(Vocabulary::Json, &request.verb);
        if let Err(outcome) = await_table(world).await {
            return render(outcome);
        }
        // The second pass is for a coordinator that fell silent. It may have made the table: `before` is the version in
        // use when it was asked, so a newer table with the wanted view is the result of this request.
        let (mut before, mut silent) = (None, String::new());
        for _ in 0..2 {
            let better = better_coordinator(world, &wanted.view).await;
            let has_factor = |it: &Table| wanted.factor.is_none_or(|factor| factor == it.factor);
            let is_new = |it: &Table| before.is_some_and(|before| it.version > before);
            let is_made = |it: &Arc<Table>| is_new(it) && it.view == wanted.view && has_factor(it);
            if let Some(table) = world.with(|node| node.table()).filter(is_made) {
                return render(describe_change(world, &table).await);
            }
            before = world.with(|node| node.version());
            let Some(node) = better else {
                let (is_member, missing) = world.with(|node| (node.shard.is_some(), node.missing()));
                return render(if is_member { change_view(world, wanted).await } else { Outcome::NodeDown(missing) });
            };
            let origin = Origin::Node(world.with(|node| node.store()));
            // Without its age: it would be refused as late.
            let passed_on = Request { origin, began: None, ..request.clone() };
            match world.relay(&node, passed_on, CHANGE_LIMIT).await {
                Ok(answer) => return answer,
                Err(_) => silent = node,
            }
        }
        render(Outcome::NodeDown(silent))
    }

    /// R9: the node that must coordinate instead of this one: a member of the table, if this node is none (and may have
    /// missed newer tables); or, if this node is alone without keys, a node of the wanted view that has keys or a
    /// store.
    async fn better_coordinator(world: &impl World, view: &[String]) -> Option<String> {
        let (table, status, own) = world.with(|node| (node.table(), node.status(), node.own().to_owned()));
        let table = table?;
        let is_member = status.members > 0;
        if status.members > 1 || status.keys > 0 {
            return None;
        }
        let others = if is_member { view } else { &table.view };
        let others: Vec<String> = others.iter().filter(|node| **node != own).cloned().collect();
        let replies = meet_all(world, &others).await;
        let fits = |it: &Status| {
            // A node that left this node's own store cannot coordinate for it.
            let has_left_another = it.version.is_some() && it.members == 0 && it.store != table.store;
            !is_member || it.keys > 0 || it.members > 1 || has_left_another
        };
        let mut answering = others.into_iter().zip(replies).filter(|(_, it)| it.as_ref().is_some_and(fits));
        answering.next().map(|(node, _)| node)
    }

    enum Failure {
        Refused(Outcome),
        /// To be retried: another change is ending, or a node is starting.
        Again(Outcome),
    }

    /// For how long a view change is retried.
    const RETRY_LIMIT: Duration = Duration::from_secs(4);
    /// Nodes that are still silent after this long are reported as unreached.
    const UNREACHED: Duration = Duration::from_secs(3);

    async fn change_view(world: &impl World, wanted: &WantedView) -> Outcome {
        let deadline = world.with(|node| node.now) + RETRY_LIMIT;
        loop {
            let begun = world.with(|node| node.begin_change(&wanted.view, wanted.force));
            let Some((base, version)) = begun else { return Outcome::ChangeUnderWay };
            let attempt = Attempt { world, base, version, wanted };
            let nodes = attempt.nodes();
            let result = attempt.run(&nodes).await;
            world.with(|node| node.coordinating = false);
            let failure = match result {
                Ok(table) => return describe_change(world, &table).await,
                Err(failure) => failure,
            };
            ask(world, &nodes, Message::Lock(version, Vec::new())).await;
            match failure {
                Failure::Again(_) if world.with(|node| node.now) < deadline => {
                    world.sleep(Duration::from_millis(50)).await;
                }
                Failure::Refused(outcome) | Failure::Again(outcome) => return outcome,
            }
        }
    }

    async fn describe_change(world: &impl World, table: &Table) -> Outcome {
        let unreached = await_settled(world, table).await;
        let mut shards = Vec::new();
        for (index, (nodes, count)) in table.shards.iter().zip(&table.counts).enumerate() {
            let mut shard = json!({"shard-id": id_of(index)});
            if let [only] = &nodes[..] {
                shard["address"] = json!(only);
            }
            shard["replicas"] = json!(nodes);
            shard["key-count"] = json!(count);
            shards.push(shard);
        }
        let mut change = json!({"moved": table.moved, "shards": shards});
        if !unreached.is_empty() {
            change["unreached"] = json!(unreached);
        }
        Outcome::ViewChanged(change)
    }

    /// Waits until the table is settled (R8). Returns the nodes that stay silent meanwhile.
    async fn await_settled(world: &impl World, table: &Table) -> Vec<String> {
        let nodes: Vec<String> = table.nodes(false).into_iter().cloned().collect();
        let (mut silence, mut pause) = (Duration::ZERO, 2);
        loop {
            let began = world.with(|node| node.now);
            let replies = meet_all(world, &nodes).await;
            let (now, version, settled) = world.with(|node| (node.now, node.version(), node.settled));
            if settled || version != Some(table.version) {
                // All nodes learn of it now, and not by later meetings.
                meet_all(world, &nodes).await;
                return Vec::new();
            }
            let is_silent = |(_, reply): &(&String, &Option<Status>)| reply.is_none();
            let silent: Vec<String> = nodes.iter().zip(&replies).filter(is_silent).map(|it| it.0.clone()).collect();
            // A round counts for a second at most: this process may have been stopped.
            silence += (now - began).min(Duration::from_secs(1)) + Duration::from_millis(pause);
            if silent.is_empty() {
                silence = Duration::ZERO;
            } else if silence > UNREACHED {
                return silent;
            }
            world.sleep(Duration::from_millis(pause)).await;
            pause = (pause * 2).min(20);
        }
    }

    struct Attempt<'a, W> {
        world: &'a W,
        base: Arc<Table>,
        version: Version,
        wanted: &'a WantedView,
    }

    type Granted = BTreeMap<String, Status>;

    impl<W: World> Attempt<'_, W> {
        fn nodes(&self) -> Vec<String> {
            let mut nodes = self.base.nodes(self.world.with(|node| node.settled));
            nodes.extend(&self.wanted.view);
            nodes.into_iter().cloned().collect()
        }

        /// R9: locks the nodes and makes the table. Adopting it is the change.
        async fn run(&self, nodes: &[String]) -> Result<Arc<Table>, Failure> {
            let began = self.world.with(|node| node.now);
            let granted = self.lock(nodes).await?;
            let silent: Vec<String> = nodes.iter().filter(|node| !granted.contains_key(*node)).cloned().collect();
            self.check_silent(&granted, &silent)?;
            let settled = self.check_granted(&granted, !silent.is_empty())?;
            let change = Change::new(&self.base, &self.wanted.view, self.wanted.factor.unwrap_or(self.base.factor));
            let representatives = self.representatives(&granted);
            let mut held = vec![0; self.base.shards.len()];
            representatives.iter().for_each(|(shard, node)| held[*shard] = granted[node].keys);
            let (moves, counts) = change.plan(&held);
            let cuts = self.survey(&change, &moves, &representatives).await?;
            let mut table = self.base.next(self.version, &change, &cuts, &silent, settled);
            (table.moved, table.counts) = (moves.iter().map(|(.., count)| count).sum(), counts);
            let table = Arc::new(table);
            let is_adopted = self.world.with(|node| node.adopt_own(table.clone(), began));
            if is_adopted { Ok(table) } else { Err(Failure::Again(Outcome::ChangeUnderWay)) }
        }

        /// Locks the lowest address first: of two coordinators one fails there, and they do not block each other.
        async fn lock(&self, nodes: &[String]) -> Result<Granted, Failure> {
            let mut granted = Granted::new();
            let (lowest, rest) = nodes.split_at(1);
            let mut missing = Vec::new();
            for group in [lowest, rest] {
                let message = Message::Lock(self.version, nodes.to_vec());
                for (name, reply) in group.iter().zip(ask(self.world, group, message).await) {
                    match reply {
                        Some(Reply::Met(status, _)) if status.promised == self.version => {
                            granted.insert(name.clone(), *status);
                        }
                        Some(_) => return Err(Failure::Again(Outcome::ChangeUnderWay)),
                        None => missing.push(name.clone()),
                    }
                }
            }
            // If one of them is up, only a message was lost.
            let is_up = meet_all(self.world, &missing).await.iter().any(Option::is_some);
            if is_up { Err(Failure::Again(Outcome::ChangeUnderWay)) } else { Ok(granted) }
        }

        /// Whether a node has granted the lock and is whole by the base.
        fn is_whole(&self, granted: &Granted, node: &str) -> bool {
            granted.get(node).is_some_and(|status| status.is_whole_by(self.base.version))
        }

        /// R9: silent nodes may be left out by force; or if a whole replica of each one's shard, and more than half of
        /// the old view, have granted the lock by the base, so that two sides of a cut cannot both do it.
        fn check_silent(&self, granted: &Granted, silent: &[String]) -> Result<(), Failure> {
            let Some(first) = silent.first() else { return Ok(()) };
            let down = |node: &String| Failure::Refused(Outcome::NodeDown(node.clone()));
            if let Some(joining) = silent.iter().find(|node| self.wanted.view.contains(node)) {
                return Err(down(joining));
            } else if self.wanted.force {
                return Ok(());
            }
            let base = &self.base;
            let goes_by_it = |node: &&String| granted.get(*node).is_some_and(|it| it.version == Some(base.version));
            let is_majority = 2 * base.view.iter().filter(goes_by_it).count() > base.view.len();
            let is_whole = |node: &String| self.is_whole(granted, node);
            let has_other =
                |node: &String| base.shard_of(node).is_some_and(|shard| base.shards[shard].iter().any(is_whole));
            let is_starting = |node: &String| granted.contains_key(node) && !is_whole(node);
            let may_leave_out = is_majority && silent.iter().all(has_other);
            // An attempt that began before they were known to be silent has no new epoch. The next one has.
            if may_leave_out && self.version.epoch > base.version.epoch {
                Ok(())
            } else if may_leave_out || base.view.iter().any(is_starting) {
                Err(Failure::Again(Outcome::NodeDown(first.clone())))
            } else {
                Err(down(first))
            }
        }

        /// R9: checks that each locked node uses the base or may join. Returns whether the base is settled. If it is
        /// not, the change must be by force and leave out silent nodes: others may wait for these.
        fn check_granted(&self, granted: &Granted, leaves_out: bool) -> Result<bool, Failure> {
            let settled = self.world.with(|node| node.settled);
            if !(settled || self.wanted.force && leaves_out) {
                return Err(Failure::Again(Outcome::ChangeUnderWay));
            }
            for (node, status) in granted {
                let is_part = self.base.nodes(settled).contains(node);
                let newer = status.store == self.base.store && status.version > Some(self.base.version);
                if newer || is_part && status.version.is_some_and(|version| version != self.base.version) {
                    return Err(Failure::Again(Outcome::ChangeUnderWay));
                } else if self.wanted.view.contains(node) && !self.base.lists(node) {
                    self.check_joining(node, status, settled)?;
                }
            }
            Ok(settled)
        }

        /// R9: a node may join if it uses the base, or if it is without keys and has left its store or is alone in it.
        /// One that uses the base must know if that is settled: it would keep what was deleted since.
        fn check_joining(&self, node: &str, status: &Status, settled: bool) -> Result<(), Failure> {
            let uses_base = status.version == Some(self.base.version) && status.settled == settled;
            let is_free = status.members == 1 || status.members == 0 && status.settled;
            if status.version.is_none() {
                // It has just started, and may belong to a store that it has not heard of yet.
                Err(Failure::Again(Outcome::NodeDown(node.to_owned())))
            } else if uses_base || is_free && status.keys == 0 && status.is_whole {
                Ok(())
            } else if status.members > 0 {
                Err(Failure::Refused(Outcome::HoldsKeys(node.to_owned())))
            } else {
                Err(Failure::Again(Outcome::ChangeUnderWay))
            }
        }

        /// For each shard a replica that granted the lock, whole if possible: it counts the keys and finds the cuts.
        fn representatives(&self, granted: &Granted) -> Vec<(usize, String)> {
            let mut representatives = Vec::new();
            for shard in 0..self.base.shards.len() {
                let answering = self.base.shards[shard].iter().filter(|node| granted.contains_key(*node));
                let best = answering.min_by_key(|node| !self.is_whole(granted, node));
                representatives.extend(best.map(|node| (shard, node.clone())));
            }
            representatives
        }

        async fn survey(
            &self,
            change: &Change,
            moves: &[Move],
            representatives: &[(usize, String)],
        ) -> Result<Vec<Cut>, Failure> {
            let moves_of = |shard: usize| moves.iter().filter(move |(giver, ..)| *giver == shard);
            let mut messages = Vec::new();
            for (shard, node) in representatives {
                let mut counts = vec![0];
                moves_of(*shard).for_each(|(.., count)| counts.push(counts[counts.len() - 1] + count));
                messages.push((node.clone(), Message::Survey(self.version, counts.split_off(1))));
            }
            let replies = ask_each(self.world, messages).await;
            let (mut cuts, mut keys) = (Vec::new(), vec![Some(Vec::new()); self.base.shards.len()]);
            for ((shard, node), reply) in representatives.iter().zip(replies) {
                let (places, hashes) = match reply {
                    Some(Reply::Surveyed(places, hashes)) => (places, hashes),
                    Some(_) => return Err(Failure::Again(Outcome::ChangeUnderWay)),
                    None => return Err(Failure::Again(Outcome::NodeDown(node.clone()))),
                };
                keys[*shard] = hashes;
                let mut last = u64::MAX;
                for ((giver, receiver, _), first) in moves_of(*shard).zip(places) {
                    if first <= last {
                        cuts.push(Cut { giver: *giver, span: Span { first, last }, receiver: *receiver });
                        last = first.saturating_sub(1);
                    }
                }
            }
            Ok(change.deal_out_stretches(&self.base, cuts, &keys))
        }
    }
}

// ---- Peers: what one instance asks another --------------------------------------------------------------------------

mod peers {
    //! Carries requests to other instances, and serves theirs.
    //!
    //! A *stream* carries requests one way and their answers the other way, in any order. It consists of two HTTP
    //! requests with the same random id: the body of a POST carries the requests, and the body of the answer to a GET
    //! carries the answers. Both last as long as the stream.
    //!
    //! - The asking side has one stream to each instance: one thread writes requests, another reads answers. A caller
    //!   queues its request and waits; what is queued during one write leaves with the next. When a stream ends, the
    //!   requests that were sent on it fail, and the others go to a new stream.
    //! - The asked side serves both HTTP requests as connections. The coroutine of the POST reads requests, answers
    //!   them, and flushes the answers once it has handled all that it has read. A request that has to wait for other
    //!   instances is *deferred* to a coroutine of its own, which writes the answer itself.
    //!
    //! Each side sends something at least every `BEAT`, and ends the stream when it has read nothing for `SILENCE`.
    //!
    //! **Late writes.** When the network to the main instance is cut, the stream ends after 1.5 s and the client gets
    //! the error. The kernel may still hold the write, and delivers it if the network heals soon. Therefore each
    //! frame carries the time at which its request began, across any number of followers, and the asked side refuses
    //! a write that is older than `RELAYED_LIMIT`. As no error comes before its request began, a write takes effect
    //! within 3 s of its error or never. The same holds for a process that is stopped and continued.
    //!
    //! This needs no common clock. Times are in milliseconds since the stream was opened, and each side measures them
    //! by its own clock: the asked side from just before it writes the head of its answer, the asking side from when it
    //! has read that head. So the asked side overestimates the age of a request, by the time that the head traveled,
    //! and never underestimates it. Heartbeats keep it so when the clocks drift apart (`read_answers`).
    //!
    //! Nodes and main instances of this program take streams. Any other main instance answers the GET with something
    //! else: it gets plain requests, each from a thread of its own.

    use std::collections::{BTreeSet, HashMap, VecDeque};
    use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
    use std::net::{Shutdown, TcpStream, ToSocketAddrs};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::sync::{Arc, LazyLock, Mutex, PoisonError, mpsc};
    use std::thread::{self, Thread};
    use std::time::{Duration, Instant};

    use attohttpc::body::{Body, BodyKind, Bytes};
    use attohttpc::{Method, ProxySettings, RequestBuilder, StatusCode};
    use may::coroutine::yield_now;
    use may::sync::Blocker;
    use may_minihttp::{BodyReader, Request as Parsed};
    use percent_encoding::percent_decode;
    use serde::de::DeserializeOwned;
    use serde::{Deserialize, Serialize};
    use siphasher::sip128;
    use subtle::ConstantTimeEq;
    use url::{Position as Part, Url};

    use crate::connections::{WRITE_LIMIT, set_option, take_turn, waiting_stream};
    use crate::http::{Answer, CLOSE, Origin, Outcome, Request};
    use crate::replication::Lost;
    use crate::service::{RELAYED, RELAYS_FAILED, answer_or_defer};
    use crate::settings::{SETTINGS, own};
    use crate::world::{lock, now, park_until, pause, random, say};

    /// A connection must be established within this time: the contract reports an instance that is gone within 2 s.
    const CONNECT_LIMIT: Duration = Duration::from_millis(1100);
    /// A plain request must be answered within this time: the contract reports an instance that hangs within 5 s.
    const ANSWER_LIMIT: Duration = Duration::from_millis(4200);
    /// The time limit of a client's request, on its way through other instances and back.
    pub const PATIENCE: Duration = Duration::from_millis(4400);
    /// The time within which a request from another instance takes effect. The contract allows 3 s.
    const RELAYED_LIMIT: Duration = Duration::from_millis(2900);
    const BEAT: Duration = Duration::from_millis(250);
    const SILENCE: Duration = Duration::from_millis(1500);
    /// A stream without requests ends after this time, in milliseconds. Neighbours (`Node::begin_round`) meet more
    /// often, and so keep theirs.
    const STREAM_IDLE: i64 = 400;
    /// How long to remember that an instance takes no streams, in milliseconds.
    const PLAIN_LIMIT: i64 = 60_000;
    /// A name must be looked up within this time. With `CONNECT_LIMIT` it stays below the contract's 2 s.
    const LOOKUP_LIMIT: Duration = Duration::from_millis(700);
    /// The number of threads that may wait for an instance that takes no streams.
    const MAX_THREADS: usize = 64;

    /// Milliseconds by this side's clock.
    fn clock() -> i64 {
        now().as_millis() as i64
    }

    impl Request {
        /// The time since it began; zero for a request of this instance's own client.
        pub fn age(&self) -> Duration {
            let age = self.began.map_or(0, |began| clock().saturating_sub(began));
            Duration::from_millis(age.try_into().unwrap_or(0))
        }

        /// The time that it may still take.
        pub fn patience(&self) -> Duration {
            if self.began.is_some() { RELAYED_LIMIT.saturating_sub(self.age()) } else { PATIENCE }
        }

        /// Refuses a write whose client may have got the error already. A GET has no effect and is not refused.
        pub fn refusal_if_late(&self) -> Option<Outcome> {
            let refusal = || own().map_or(Outcome::MainDown, |own| Outcome::NodeDown(own.to_owned()));
            (self.verb != "GET" && self.patience().is_zero()).then(refusal)
        }

        /// The id of the stream that this request is a part of, if it is.
        pub fn stream_id(&self) -> Option<&str> {
            let is_part = matches!(self.verb.as_str(), "GET" | "POST") && self.content_type == STREAM;
            self.target.strip_prefix(TARGET).filter(|id| is_part && !id.is_empty())
        }

        /// The approximate size of its frame, in bytes.
        fn size(&self) -> usize {
            self.body.len() + self.target.len() + self.via.len() + self.content_type.len() + 64
        }
    }

    // -- Frames

    /// The media type of both requests of a stream, and of their answers.
    const STREAM: &str = "application/x-kv-store-stream";
    /// The target of both requests, without the id.
    const TARGET: &str = "/kv-store?stream=";
    /// The limit of a frame, and of a plain answer's body, in bytes.
    const MAX_FRAME: u32 = 17 << 20;
    /// About how many bytes of frames are read or written at a time.
    const CHUNK: usize = 64 << 10;

    /// A request, an answer or a heartbeat on a stream. It follows its length (4 bytes, little-endian), encoded by
    /// `postcard`.
    #[derive(Serialize, Deserialize)]
    struct Frame<T> {
        /// An answer has the number of its request.
        number: u64,
        /// When the request began, or the answer or heartbeat was queued: milliseconds since the stream was opened.
        time: i64,
        /// None is a heartbeat.
        content: Option<T>,
    }

    impl<T: Serialize + DeserializeOwned> Frame<T> {
        fn write(&self, out: &mut impl Write) -> io::Result<()> {
            let mut bytes = postcard::to_extend(self, vec![0; 4]).map_err(|_| io::ErrorKind::InvalidData)?;
            let length = bytes.len() as u32 - 4;
            bytes[..4].copy_from_slice(&length.to_le_bytes());
            out.write_all(&bytes)
        }

        /// Waits for a frame and reads it. An error is the end of the stream, or bytes that are no frame.
        fn read(reader: &mut impl Read) -> io::Result<Frame<T>> {
            let mut length = [0; 4];
            reader.read_exact(&mut length)?;
            let length = u32::from_le_bytes(length).min(MAX_FRAME);
            let mut bytes = Vec::with_capacity(CHUNK.min(length as usize));
            reader.take(length.into()).read_to_end(&mut bytes)?;
            postcard::from_bytes(&bytes).map_err(|_| io::ErrorKind::InvalidData.into())
        }
    }

    /// Whether these bytes begin with a whole frame.
    fn has_frame(bytes: &[u8]) -> bool {
        bytes.split_first_chunk().is_some_and(|(length, rest)| rest.len() >= u32::from_le_bytes(*length) as usize)
    }

    // -- The secret

    /// A proof that this side of a stream knows the secret, which is not sent itself: any client can make a node open a
    /// stream to any address, by naming it in a view. The proof holds for one stream (`id`), one `direction` and one
    /// asked node, so a node cannot pass off another node's answer as its own. SipHash is a message authentication
    /// code. None without a secret.
    fn proof(id: &str, direction: &str, address: &str) -> Option<String> {
        let secret = SETTINGS.secret.as_ref()?;
        let key = sip128::SipHasher24::new().hash(secret.as_bytes());
        let text = format!("{id} {direction} {address}");
        let code = sip128::SipHasher24::new_with_keys(key.h1, key.h2).hash(text.as_bytes());
        Some(format!("{:032x}", code.as_u128()))
    }

    /// Whether `given` is that proof, or this node has no secret. Compares in constant time.
    fn is_proven(given: &[u8], id: &str, direction: &str, address: &str) -> bool {
        proof(id, direction, address).is_none_or(|proof| proof.as_bytes().ct_eq(given).into())
    }

    // -- The asked side

    /// While deferred requests hold more than this, in bytes, no further request is read from a stream: each holds its
    /// stack, its frame, and its answer until that is written. Answers may take the total to four times this before
    /// their streams are ended (`Asked::answer`). The clients of followers may use half of it, so that they cannot keep
    /// nodes from answering one another. It keeps the stacks below the number of mappings that `MAX_CONNECTIONS`
    /// leaves.
    const MAX_HELD: usize = 32 << 20;
    /// What a deferred request takes besides its frame, in bytes.
    const STACK: usize = 8 << 10;

    /// The limit of streams. Those who do not prove that they know the secret may take up half of it.
    const MAX_STREAMS: usize = 1000;

    static HELD: AtomicUsize = AtomicUsize::new(0);
    /// The streams on which this instance is asked, by their ids.
    static ASKED: LazyLock<Mutex<HashMap<String, Arc<Asked>>>> = LazyLock::new(Default::default);

    /// A stream on which this instance is asked. Only coroutines use it.
    struct Asked {
        /// When it was opened, by this side's clock.
        opened: i64,
        /// The connection of the GET, for `end`: `output` may be locked by a coroutine that waits for the other side.
        socket: TcpStream,
        output: may::sync::Mutex<BufWriter<may::net::TcpStream>>,
    }

    impl Asked {
        /// Locks the output, also after a panic of a coroutine that held it.
        fn output(&self) -> may::sync::MutexGuard<'_, BufWriter<may::net::TcpStream>> {
            self.output.lock().unwrap_or_else(PoisonError::into_inner)
        }

        /// Writes an answer, or a heartbeat, to the output.
        fn write(&self, number: u64, answer: Option<Answer>) -> io::Result<()> {
            let frame = Frame { number, time: clock() - self.opened, content: answer.map(Answer::joined) };
            frame.write(&mut *self.output())
        }

        fn end(&self) {
            let _ = self.socket.shutdown(Shutdown::Both);
        }

        /// Reads and answers requests until the stream ends.
        fn serve(self: &Arc<Asked>, body: &mut BodyReader, socket: &TcpStream, knows_secret: bool) -> io::Result<()> {
            // The limit is for each read, not for each frame: a large one on a slow link takes longer.
            let connection = waiting_stream(socket, Some(SILENCE))?;
            // What the server has read together with the head of the POST.
            let begun = body.fill_buf()?.to_vec();
            body.consume(begun.len());
            let mut reader = BufReader::new(begun.chain(connection));
            loop {
                if !has_frame(reader.buffer()) {
                    self.output().flush()?;
                    // Acknowledge the next packet at once. The other side sends no second small packet before (RFC
                    // 896), and no answer on this connection would carry the acknowledgement. The kernel resets this
                    // option.
                    set_option(socket, libc::IPPROTO_TCP, libc::TCP_QUICKACK, 1);
                }
                let Frame { number, time, content } = Frame::<Request>::read(&mut reader)?;
                let Some(mut request) = content else { continue };
                request.began = Some(self.opened.saturating_add(time));
                let size = request.size();
                if request.origin == Origin::Client || knows_secret {
                    self.answer(number, request)?;
                } else {
                    self.write(number, Some(Outcome::NotOfStore.answer(request.route().1, &request.verb)))?;
                }
                take_turn(socket, size);
            }
        }

        /// Answers a request, now or in a coroutine of its own.
        fn answer(self: &Arc<Asked>, number: u64, request: Request) -> io::Result<()> {
            let limit = if request.origin == Origin::Client { MAX_HELD / 2 } else { MAX_HELD };
            while HELD.load(SeqCst) > limit {
                self.output().flush()?;
                pause(Duration::from_millis(1));
            }
            let size = request.size() + STACK;
            let work = match answer_or_defer(request) {
                Ok(answer) => return self.write(number, Some(answer)),
                Err(work) => work,
            };
            HELD.fetch_add(size, SeqCst);
            let stream = self.clone();
            may::go!(move || {
                // Too many large answers that nobody reads end their streams.
                let answer = catch_unwind(AssertUnwindSafe(work)).ok().filter(|_| HELD.load(SeqCst) < 4 * MAX_HELD);
                let length = answer.as_ref().map_or(0, Answer::length);
                HELD.fetch_add(length, SeqCst);
                let is_written = answer.is_some_and(|answer| stream.write(number, Some(answer)).is_ok());
                // The answers of other coroutines that are ready leave with this one.
                yield_now();
                // Without an answer, as after a panic, the asking side must not wait.
                if !is_written || stream.output().flush().is_err() {
                    stream.end();
                }
                HELD.fetch_sub(size + length, SeqCst);
            });
            Ok(())
        }
    }

    /// Whether a request of a stream proves that its sender knows the secret, in the form of RFC 6750 section 2.1. A
    /// wrong proof is an error; a follower gives none.
    pub fn knows_secret(parsed: &Parsed, id: &str) -> Result<bool, Outcome> {
        let mut headers = parsed.headers().iter();
        let given = headers.find(|header| header.name.eq_ignore_ascii_case("Authorization"));
        let given = given.map(|header| header.value.strip_prefix(b"Bearer ").unwrap_or_default());
        match is_proven(given.unwrap_or_default(), id, parsed.method(), own().unwrap_or_default()) {
            false if given.is_some() => Err(Outcome::NotOfStore),
            knows => Ok(knows),
        }
    }

    /// Serves the GET of a stream: sends answers and heartbeats until the stream ends, or if its POST does not come.
    pub fn carry_answers(id: &str, socket: &TcpStream, knows_secret: bool) -> io::Result<()> {
        let output = may::sync::Mutex::new(BufWriter::new(waiting_stream(socket, Some(WRITE_LIMIT))?));
        let asked = Arc::new(Asked { opened: clock(), socket: socket.try_clone()?, output });
        {
            let mut all = lock(&ASKED);
            if all.len() >= if knows_secret { MAX_STREAMS } else { MAX_STREAMS / 2 } {
                return Err(io::ErrorKind::QuotaExceeded.into());
            }
            all.insert(id.to_owned(), asked.clone());
        }
        // A proof is sent only to who has given one.
        let proof = proof(id, "answer", own().unwrap_or_default()).filter(|_| knows_secret);
        let proof = proof.map_or(String::new(), |proof| format!("Authentication-Info: {proof}\r\n"));
        // Without a length, the body ends with the connection (RFC 9112 section 6.3).
        let head = format!("HTTP/1.1 200 OK\r\nServer: M\r\nContent-Type: {STREAM}\r\n{proof}{CLOSE}\r\n");
        let mut written = asked.output().write_all(head.as_bytes());
        // The coroutine of its POST, once that has come, has a third reference, and ends the stream at its end.
        let is_awaited = || clock() - asked.opened < SILENCE.as_millis() as i64;
        while written.is_ok() && (Arc::strong_count(&asked) > 2 || is_awaited()) {
            written = asked.write(0, None).and_then(|()| asked.output().flush());
            pause(BEAT);
        }
        lock(&ASKED).remove(id);
        written
    }

    /// Serves the POST of a stream: answers requests until the stream ends.
    pub fn read_requests(id: &str, mut body: BodyReader, socket: &TcpStream, knows_secret: bool) {
        let asked = lock(&ASKED).get(id).cloned();
        if let Some(asked) = asked {
            // A panic ends the stream.
            let _ = catch_unwind(AssertUnwindSafe(|| asked.serve(&mut body, socket, knows_secret)));
            asked.end();
        }
    }

    // -- Questions

    /// The receiving end of a one-shot channel: an answer that a coroutine or thread waits for.
    pub struct Question<T = Result<Answer, Lost>> {
        asker: Arc<Blocker>,
        deadline: Instant,
        answer: Mutex<Option<T>>,
    }

    /// The sending end. Dropping it wakes the asker, with an answer or without. Never drop it while holding a lock: a
    /// coroutine that is woken while it parks continues inside the call that parks it, and dropping its Blocker waits
    /// for that call to return. If the coroutine then wants the lock, both wait for ever.
    pub struct Waiting<T = Result<Answer, Lost>>(Arc<Question<T>>);

    impl<T> Question<T> {
        pub fn new(patience: Duration) -> (Arc<Question<T>>, Waiting<T>) {
            let (asker, deadline) = (Blocker::current(), Instant::now() + patience);
            let question = Arc::new(Question { asker, deadline, answer: Mutex::default() });
            (question.clone(), Waiting(question))
        }

        /// Waits for the answer. None if the deadline has passed or `Waiting` was dropped.
        pub fn answer(&self) -> Option<T> {
            park_until(&self.asker, self.deadline);
            lock(&self.answer).take()
        }
    }

    impl<T> Waiting<T> {
        pub fn deliver(self, answer: T) {
            *lock(&self.0.answer) = Some(answer);
        }
    }

    impl<T> Drop for Waiting<T> {
        fn drop(&mut self) {
            self.0.asker.unpark();
        }
    }

    /// Delivers answers to their askers. To wake a coroutine takes a system call from a thread, and none from another
    /// coroutine.
    fn deliver(answers: Vec<(Waiting, Answer)>) {
        let are_several = answers.len() > 1;
        let deliver = || answers.into_iter().for_each(|(waiting, answer)| waiting.deliver(Ok(answer)));
        if are_several { drop(may::go!(deliver)) } else { deliver() }
    }

    // -- The asking side

    /// Identifies this process in the `Via` of what it relays. A request that comes back with it is in a relay loop.
    static VIA: LazyLock<String> = LazyLock::new(|| format!("1.1 kv-store-{:016x}", random()));
    /// What is being asked of each instance, by its address. An entry lasts as long as its stream.
    static TRAFFIC: LazyLock<Mutex<HashMap<String, Traffic>>> = LazyLock::new(Default::default);
    /// The nodes that were reported on stderr as of another store.
    static STRANGERS: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

    struct Traffic {
        /// The id of the stream.
        id: u64,
        /// The thread that takes what is queued.
        sender: Thread,
        /// When the stream was opened, by this side's clock; 0 before.
        opened: i64,
        /// When a request was last queued, by this side's clock.
        last_asked: i64,
        last_number: u64,
        queue: VecDeque<(Request, Waiting)>,
        /// Who waits for the answers to requests that were sent, by number.
        sent: HashMap<u64, Waiting>,
    }

    impl Traffic {
        /// Starts the thread of a new stream. It cannot look for its entry before the caller has unlocked `TRAFFIC`.
        fn begin(address: &str) -> io::Result<Traffic> {
            let id = random();
            let stream = Stream { address: address.to_owned(), id };
            let run = move || {
                // A panic ends the stream, as an error does.
                let _ = catch_unwind(AssertUnwindSafe(|| stream.carry()));
                stream.end_if(|_| true);
            };
            let sender = thread::Builder::new().spawn(run)?.thread().clone();
            let (opened, last_asked, last_number, queue, sent) = Default::default();
            Ok(Traffic { id, sender, opened, last_asked, last_number, queue, sent })
        }

        fn is_idle(&self) -> bool {
            self.queue.is_empty() && self.sent.is_empty() && clock() - self.last_asked > STREAM_IDLE
        }
    }

    /// Relays a request to the instance at `address` and waits for its answer. An error: there is none within
    /// `patience`, or the request is in a relay loop. The request is sent at most once.
    pub fn relay(address: &str, request: Request, patience: Duration) -> Result<Answer, Lost> {
        let result = begin(address, request, patience).answer().unwrap_or(Err(Lost { was_sent: true }));
        RELAYED.fetch_add(1, SeqCst);
        RELAYS_FAILED.fetch_add(result.is_err().into(), SeqCst);
        result
    }

    /// Queues a request to the instance at `address`. The caller may queue others before it waits for the answer.
    pub fn begin(address: &str, mut request: Request, patience: Duration) -> Arc<Question> {
        let (question, waiting) = Question::new(patience);
        // Messages of nodes are never relayed further.
        if request.origin != Origin::Message {
            if request.via.split(',').any(|hop| hop.trim() == *VIA) {
                waiting.deliver(Err(Lost { was_sent: false }));
                return question;
            }
            request.via = if request.via.is_empty() { VIA.clone() } else { format!("{}, {}", request.via, *VIA) };
        }
        request.began.get_or_insert_with(clock);
        enqueue(address, request, waiting);
        question
    }

    /// Queues a request, on a new stream if there is none. Where the system has no room for a thread, it gets no
    /// answer.
    fn enqueue(address: &str, request: Request, waiting: Waiting) {
        let mut all = lock(&TRAFFIC);
        if !all.contains_key(address)
            && let Ok(traffic) = Traffic::begin(address)
        {
            all.insert(address.to_owned(), traffic);
        }
        // On return `waiting` is dropped after the guard `all`: parameters are dropped last.
        let Some(traffic) = all.get_mut(address) else { return };
        traffic.last_asked = clock();
        traffic.queue.push_back((request, waiting));
        let sender = (traffic.queue.len() == 1).then(|| traffic.sender.clone());
        drop(all);
        if let Some(sender) = sender {
            // The requests of other coroutines that are ready leave with this one.
            yield_now();
            sender.unpark();
        }
    }

    /// A stream to another instance, or plain requests to one that takes no streams.
    #[derive(Clone)]
    struct Stream {
        address: String,
        id: u64,
    }

    impl Stream {
        /// Looks at the stream's entry. None if the stream has ended.
        fn with<T>(&self, action: impl FnOnce(&mut Traffic) -> T) -> Option<T> {
            lock(&TRAFFIC).get_mut(&self.address).filter(|traffic| traffic.id == self.id).map(action)
        }

        /// Ends the stream if the condition holds. What was sent gets no answer. What is queued goes to a new stream,
        /// or fails if this one could not be opened. Returns whether the stream has ended.
        fn end_if(&self, condition: impl FnOnce(&Traffic) -> bool) -> bool {
            let mut all = lock(&TRAFFIC);
            let is_due = all.get(&self.address).filter(|traffic| traffic.id == self.id).map(condition);
            let ended = if is_due == Some(true) { all.remove(&self.address) } else { None };
            drop(all);
            let was_open = ended.as_ref().is_some_and(|traffic| traffic.opened > 0);
            for (request, waiting) in ended.into_iter().flat_map(|traffic| traffic.queue) {
                if was_open {
                    enqueue(&self.address, request, waiting);
                } else {
                    waiting.deliver(Err(Lost { was_sent: false }));
                }
            }
            is_due != Some(false)
        }

        /// Opens the stream, starts the thread that writes requests, and reads answers until the stream ends.
        fn carry(&self) -> attohttpc::Result<()> {
            let host = find_host(&self.address)?;
            let id = format!("{:016x}", self.id);
            let open = |verb: &str| {
                let builder = client(verb, &format!("http://{host}{TARGET}{id}"), SILENCE)?;
                let builder = builder.try_header("Content-Type", STREAM)?.try_header("Via", VIA.as_str())?;
                attohttpc::Result::Ok(match proof(&id, verb, &self.address) {
                    Some(proof) => builder.bearer_auth(proof),
                    None => builder,
                })
            };
            let (_, headers, answers) = open("GET")?.send()?.split();
            let given = headers.get("Authentication-Info").map_or(&b""[..], |value| value.as_bytes());
            let is_stream = headers.get("Content-Type").is_some_and(|it| it == STREAM);
            if !is_stream || !is_proven(given, &id, "answer", &self.address) {
                if own().is_none() {
                    self.send_plainly();
                    return Ok(());
                }
                // A node takes streams from all nodes of its store.
                if lock(&STRANGERS).insert(self.address.clone()) {
                    say(&format!("node {} is of another store, or has another SECRET", self.address));
                }
                return Err(io::Error::from(io::ErrorKind::PermissionDenied).into());
            }
            self.with(|traffic| traffic.opened = clock());
            let (post, stream) = (open("POST")?.body(self.clone()), self.clone());
            // `send` returns when the stream has ended and its last write is done, and closes the connection. Then the
            // other side closes the other one. (The client has no write timeout: where the send buffer is full when the
            // network is cut, the last write fails when TCP gives up, after some 15 minutes.)
            let send = move || {
                let _ = post.send();
                stream.end_if(|_| true);
            };
            thread::Builder::new().spawn(send)?;
            Ok(self.read_answers(answers)?)
        }

        fn read_answers(&self, answers: impl Read) -> io::Result<()> {
            let (mut answers, mut batch) = (BufReader::with_capacity(CHUNK, answers), Vec::new());
            loop {
                let Frame { number, time, content } = Frame::<Answer>::read(&mut answers)?;
                let read = self.with(|traffic| match content {
                    Some(answer) => batch.extend(traffic.sent.remove(&number).map(|waiting| (waiting, answer))),
                    // The asked side opened the stream at this time or earlier. A heartbeat that waited behind large
                    // answers gives too late a time, so the earliest counts. It may rise by 1 ms a heartbeat, since the
                    // asked side's clock may be slower.
                    None => traffic.opened = clock().saturating_sub(time).min(traffic.opened.saturating_add(1)),
                });
                if read.is_none() {
                    return Ok(());
                }
                if !has_frame(answers.buffer()) {
                    deliver(std::mem::take(&mut batch));
                }
            }
        }

        /// What the sender writes next: what is queued, or else a heartbeat. None if the stream has ended.
        fn next_batch(&self) -> Option<Vec<Frame<Request>>> {
            let began = Instant::now();
            while began.elapsed() < BEAT && self.with(|traffic| traffic.queue.is_empty())? {
                thread::park_timeout(BEAT);
            }
            self.with(|traffic| {
                let (mut batch, mut size) = (Vec::new(), 0);
                while size < CHUNK
                    && let Some((request, waiting)) = traffic.queue.pop_front()
                {
                    size += request.size();
                    traffic.last_number += 1;
                    traffic.sent.insert(traffic.last_number, waiting);
                    let time = request.began.map_or(0, |began| began.saturating_sub(traffic.opened));
                    batch.push(Frame { number: traffic.last_number, time, content: Some(request) });
                }
                if batch.is_empty() {
                    batch.push(Frame { number: 0, time: 0, content: None });
                }
                batch
            })
        }

        /// Sends each queued request from a thread of its own. Ends after `PLAIN_LIMIT`: by then the instance may be
        /// another program.
        fn send_plainly(&self) {
            let (threads, end) = (Arc::new(()), clock() + PLAIN_LIMIT);
            while clock() < end || !self.end_if(|traffic| traffic.queue.is_empty()) {
                let may_send = Arc::strong_count(&threads) <= MAX_THREADS;
                let next = self.with(|traffic| traffic.queue.pop_front_if(|_| may_send));
                let Some((request, waiting)) = next.flatten() else {
                    // The end of a thread wakes nobody.
                    thread::park_timeout(Duration::from_millis(10));
                    continue;
                };
                let (address, thread) = (self.address.clone(), threads.clone());
                let send = move || {
                    if !request.patience().is_zero()
                        && let Ok(host) = find_host(&address)
                        && let Ok(answer) = request.send(&host)
                    {
                        waiting.deliver(Ok(answer));
                    }
                    drop(thread);
                };
                let _ = thread::Builder::new().spawn(send);
            }
        }
    }

    /// The body of the stream's POST, which carries the requests.
    impl Body for Stream {
        fn kind(&mut self) -> io::Result<BodyKind> {
            // More than any stream carries.
            Ok(BodyKind::KnownLength(1 << 62))
        }

        fn write<W: Write>(&mut self, mut writer: W) -> io::Result<()> {
            self.with(|traffic| traffic.sender = thread::current());
            while let Some(batch) = self.next_batch() {
                batch.iter().try_for_each(|frame| frame.write(&mut writer))?;
                writer.flush()?;
                self.end_if(Traffic::is_idle);
            }
            // An error makes attohttpc give up: it must not wait for an answer to a body that is cut off.
            Err(io::ErrorKind::ConnectionAborted.into())
        }
    }

    // -- The client

    /// A `host:port` with the name looked up, which the client would do without a limit: a name server that does not
    /// answer holds a lookup for ten seconds, so it has a thread of its own, which ends when it ends. A name that
    /// stands for several addresses is left to the client, since it tries them side by side.
    fn find_host(address: &str) -> io::Result<String> {
        let (name, (tell, told)) = (address.to_owned(), mpsc::channel());
        let look_up = move || tell.send(name.to_socket_addrs().map_or(Vec::new(), Iterator::collect));
        thread::Builder::new().spawn(look_up)?;
        match &told.recv_timeout(LOOKUP_LIMIT).unwrap_or_default()[..] {
            [] => Err(io::ErrorKind::HostUnreachable.into()),
            [one] => Ok(one.to_string()),
            _ => Ok(address.to_owned()),
        }
    }

    /// A request of the client, without what it would do by itself: it reads `http_proxy`, and follows redirects. The
    /// limit is for connecting, and for each read.
    fn client(verb: &str, url: &str, limit: Duration) -> attohttpc::Result<RequestBuilder> {
        let method = Method::from_bytes(verb.as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let builder = RequestBuilder::try_new(method, url)?.proxy_settings(ProxySettings::builder().build());
        Ok(builder.follow_redirects(false).connect_timeout(CONNECT_LIMIT).read_timeout(limit))
    }

    impl Request {
        /// The target on a host. None if plain HTTP cannot carry it: the client takes the segments `.` and `..`, which
        /// may be keys, out of a target, and makes something of its own of CONNECT. A target that is no path would go
        /// on with the host: `@another:80/`.
        fn url(&self, host: &str) -> Option<String> {
            let url = format!("http://{host}{}", self.target);
            let same =
                |sent: Url| percent_decode(sent[..Part::AfterQuery].as_bytes()).eq(percent_decode(url.as_bytes()));
            let is_kept = self.target.starts_with('/') && self.verb != "CONNECT" && Url::parse(&url).is_ok_and(same);
            is_kept.then_some(url)
        }

        /// Sends the request to a host and reads the answer, of which status, `Content-Type`, `Allow` and body go on.
        /// The limit is for all of it, however slowly the answer drips.
        pub fn send(&self, host: &str) -> attohttpc::Result<Answer> {
            let url = self.url(host).ok_or(io::Error::from(io::ErrorKind::InvalidInput))?;
            let mut builder = client(&self.verb, &url, ANSWER_LIMIT)?.timeout(ANSWER_LIMIT);
            for (name, value) in [("Via", &self.via), ("Content-Type", &self.content_type)] {
                if !value.is_empty() {
                    builder = builder.try_header(name, value)?;
                }
            }
            // Not `builder.bytes`, which names a type where there is none.
            let (status, headers, reader) = builder.body(Bytes(&self.body)).send()?.split();
            if status.is_informational() || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
                // No final answer, or none that such a request may get (RFC 9110 section 15).
                return Err(io::Error::from(io::ErrorKind::InvalidData).into());
            }
            let value = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
            let mut body = Vec::new();
            let length = reader.take(u64::from(MAX_FRAME)).read_to_end(&mut body)?;
            let is_cut = value("Content-Length").is_some_and(|expected| expected.parse() != Ok(length));
            if is_cut || length as u64 == u64::from(MAX_FRAME) {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            let content_type = value("Content-Type").unwrap_or("application/octet-stream");
            let allow = value("Allow").map_or(String::new(), |verbs| format!("\r\nAllow: {verbs}"));
            let header = format!("Content-Type: {content_type}{allow}").into();
            Ok(Answer { status: status.as_u16(), header, body, value: None })
        }
    }
}

// ---- World: the real lock, clock and network ------------------------------------------------------------------------

mod world {
    //! What other modules use of the system: lock, clock, messages, sleeping, threads, stderr. The simulation replaces
    //! `Live`. Begin with `Live::with` and `unlock_node`, which does what is slow after the lock (`Node::later`).

    use std::collections::BTreeMap;
    use std::fs::File;
    use std::hash::{BuildHasher, RandomState};
    use std::io::{self, Write};
    use std::os::fd::AsFd;
    use std::os::unix::fs::OpenOptionsExt;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::pin::pin;
    use std::process::exit;
    use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError, mpsc};
    use std::task::{Context, Poll, Waker};
    use std::thread;
    use std::time::{Duration, Instant, SystemTime};

    use may::sync::Blocker;

    use crate::http::{Answer, Origin, Outcome, Request, Vocabulary};
    use crate::membership::run;
    use crate::node::{Envelope, Later, Message, Node, Reply};
    use crate::peers::{self, Question};
    use crate::replication::{Lost, World};
    use crate::service::Work;
    use crate::settings::{SETTINGS, own, port_of};

    /// The node of this instance. It is never locked across a wait: most keep it for microseconds, so it is a std
    /// mutex. To adopt or settle a table, or to survey keys, may take milliseconds, in which the worker stands still.
    static NODE: LazyLock<Mutex<Node>> = LazyLock::new(|| {
        let own = own().unwrap_or_default().to_owned();
        let mut node = Node::new(own, SETTINGS.view.clone(), SETTINGS.factor, random(), now());
        if node.own().is_empty() {
            node.adopt(node.first.clone());
            // Its line about the table would tell nobody anything.
            node.later = Later::default();
        }
        Mutex::new(node)
    });

    pub static START: LazyLock<(Instant, Duration)> = LazyLock::new(|| {
        (Instant::now(), SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
    });

    /// The time since 1970 at the start, and from then on by a clock that cannot be set.
    pub fn now() -> Duration {
        START.1 + START.0.elapsed()
    }

    /// A relayed view change has no shorter limit: it takes as long as moving its keys.
    pub const CHANGE_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

    /// Unlocks the node, and does what it left in `later`. Not inlined: in a hundred places it would enlarge the
    /// binary.
    #[inline(never)]
    fn unlock_node(mut node: MutexGuard<Node>) {
        let Later { lines, garbage, activities } = std::mem::take(&mut node.later);
        // Still locked, which keeps the lines in order.
        lines.iter().for_each(|line| say(line));
        drop(node);
        if !garbage.is_empty() {
            // Freeing many records takes long. Without a thread they are freed here.
            let _ = thread::Builder::new().spawn(move || drop(garbage));
        }
        for activity in activities {
            let work = move || block_on(run(Live, activity));
            while thread::Builder::new().spawn(work.clone()).is_err() {
                pause(Duration::from_millis(100));
            }
        }
    }

    /// The queue of the background thread. There is one: more would compete with the worker.
    pub static BACKGROUND: LazyLock<mpsc::Sender<Box<dyn FnOnce() + Send>>> = LazyLock::new(|| {
        let (sender, receiver) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        repeat(Duration::ZERO, move || {
            let work = receiver.recv();
            work.into_iter().for_each(|work| work());
        });
        sender
    });

    /// Computes on the background thread while the caller waits. What has to wait is returned as work and runs here.
    /// Never call it on the background thread, which would wait for itself.
    pub fn in_background(work: impl FnOnce() -> Result<Answer, Work> + Send + 'static) -> Answer {
        let (question, waiting) = Question::new(CHANGE_LIMIT);
        // If the work panics, `waiting` is dropped, and the connection is closed without an answer.
        let _ = BACKGROUND.send(Box::new(move || waiting.deliver(work())));
        let Some(done) = question.answer() else { panic!("work in the background panicked") };
        done.unwrap_or_else(|work| work())
    }

    #[derive(Clone, Copy)]
    pub struct Live;

    impl World for Live {
        fn with<T>(&self, action: impl FnOnce(&mut Node) -> T) -> T {
            let mut node = lock(&NODE);
            node.look_at_clock(now());
            let result = action(&mut node);
            unlock_node(node);
            result
        }

        async fn deliver(&self, envelopes: Vec<Envelope>) -> Vec<Option<Reply>> {
            // All are sent before the first answer is waited for.
            let replies: Vec<_> = envelopes.into_iter().map(begin_to_deliver).collect();
            replies.into_iter().map(|reply| reply()).collect()
        }

        async fn relay(&self, node: &str, request: Request, patience: Duration) -> Result<Answer, Lost> {
            peers::relay(node, request, patience)
        }

        async fn sleep(&self, time: Duration) {
            pause(time);
        }
    }

    /// Runs a future whose waits all block: one poll completes it.
    pub fn block_on<T>(future: impl Future<Output = T>) -> T {
        // Not in a Box: large allocations are slow.
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(result) => result,
            Poll::Pending => unreachable!("all waits block"),
        }
    }

    /// Sends a message. Returns the wait for its reply, which is None if there is none in time.
    fn begin_to_deliver(envelope: Envelope) -> Box<dyn FnOnce() -> Option<Reply>> {
        if own() == Some(&envelope.to) {
            return Box::new(|| Some(Live.with(|node| node.receive(envelope))));
        }
        let body = postcard::to_stdvec(&envelope).unwrap_or_default();
        let message = Request { origin: Origin::Message, body, ..Request::default() };
        // In a large store that starts, all nodes ask all.
        let asking = if matches!(envelope.message, Message::Meet(_)) { SETTINGS.view.len() as u32 } else { 0 };
        let limit = envelope.message.limit().max(Duration::from_millis(40) * asking);
        let question = peers::begin(&envelope.to, message, limit);
        Box::new(move || postcard::from_bytes(&question.answer()?.ok()?.body).ok())
    }

    /// Answers a message, in the background unless it is short. One that is too late is refused: a late lock would
    /// exclude other coordinators. (A meeting may be slow where a large store starts.) Not inlined, as `answer_about`.
    #[inline(never)]
    pub fn answer_message(request: &Request) -> Result<Answer, Work> {
        match postcard::from_bytes::<Envelope>(&request.body) {
            Ok(envelope) if own() == Some(&envelope.to) && port_of(&envelope.from).is_some() => {
                if request.age() > envelope.message.limit() && !matches!(envelope.message, Message::Meet(_)) {
                    return Ok(Answer::message(&Reply::Refused));
                }
                // These take no longer than a client's request.
                let is_short = matches!(envelope.message, Message::Push(_) | Message::GiveKey(..) | Message::Meet(_));
                let work = move || Answer::message(&Live.with(|node| node.receive(envelope)));
                if is_short { Ok(work()) } else { Err(Box::new(move || in_background(move || Ok(work())))) }
            }
            _ => Ok(Outcome::BadRequest.answer(Vocabulary::Form, "POST")),
        }
    }

    // -- Locks, sleeping, threads

    /// Locks a mutex, also after a panic elsewhere, so that one bug does not stop the instance.
    pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An unpredictable number: the standard library keys its hashes with such numbers.
    pub fn random() -> u64 {
        RandomState::new().hash_one(0)
    }

    pub fn repeat(pause: Duration, work: impl Fn() + Send + 'static) {
        thread::spawn(move || {
            loop {
                // The thread survives a panic, which the hook has printed.
                let _ = catch_unwind(AssertUnwindSafe(&work));
                thread::sleep(pause);
            }
        });
    }

    /// By wake time. The number tells apart sleepers with the same time.
    static SLEEPERS: Mutex<BTreeMap<(Instant, usize), Arc<Blocker>>> = Mutex::new(BTreeMap::new());
    static SLEEPER_CAME: Condvar = Condvar::new();
    /// Sleepers are checked at least this often. A deadline further ahead, which is rarely reached, signals nothing.
    const WAKE_INTERVAL: Duration = Duration::from_millis(100);

    /// Replaces `may::coroutine::sleep`, which still writes to the coroutine after its timer may have ended it.
    pub fn pause(time: Duration) {
        park_until(&Blocker::current(), Instant::now() + time);
    }

    /// Parks until the blocker is unparked, or until `time`.
    pub fn park_until(blocker: &Arc<Blocker>, time: Instant) {
        let key = (time, Arc::as_ptr(blocker) as usize);
        let mut sleepers = lock(&SLEEPERS);
        sleepers.insert(key, blocker.clone());
        let is_first = sleepers.keys().next() == Some(&key);
        drop(sleepers);
        if is_first && time.saturating_duration_since(Instant::now()) < WAKE_INTERVAL {
            SLEEPER_CAME.notify_one();
        }
        let _ = blocker.park(None);
        lock(&SLEEPERS).remove(&key);
    }

    pub fn wake_sleepers() {
        let mut sleepers = lock(&SLEEPERS);
        let now = Instant::now();
        let later = sleepers.split_off(&(now, usize::MAX));
        let due = std::mem::replace(&mut *sleepers, later);
        if due.is_empty() {
            let next = sleepers.keys().next().map_or(WAKE_INTERVAL, |(due, _)| due.saturating_duration_since(now));
            drop(SLEEPER_CAME.wait_timeout(sleepers, next.min(WAKE_INTERVAL)));
        } else {
            // Without the lock, which a woken coroutine may want at once (`Waiting`).
            drop(sleepers);
            due.values().for_each(|sleeper| sleeper.unpark());
        }
    }

    // -- Stderr

    /// Stderr, reopened as non-blocking (for this process only): lines are lost if a pipe is not read.
    static STDERR: LazyLock<io::Result<File>> = LazyLock::new(|| {
        let anew = File::options().append(true).custom_flags(libc::O_NONBLOCK).open("/proc/self/fd/2");
        anew.or_else(|_| io::stderr().as_fd().try_clone_to_owned().map(File::from))
    });

    /// Writes a line to stderr. Unlike eprintln!, it ignores errors.
    pub fn say(line: &str) {
        let line = format!("kv-store: {}\n", line.replace('\n', "\\n"));
        let _ = STDERR.as_ref().map(|mut stderr| stderr.write_all(line.as_bytes()));
    }

    /// Points the server's stderr, where it writes a line for each malformed request, to /dev/null. This program's
    /// lines go to the old one.
    pub fn keep_stderr() -> io::Result<()> {
        LazyLock::force(&STDERR);
        nix::unistd::dup2_stderr(File::options().write(true).open("/dev/null")?)?;
        std::panic::set_hook(Box::new(|panic| say(&panic.to_string())));
        Ok(())
    }

    pub fn fail(status: i32, line: &str) -> ! {
        say(line);
        exit(status)
    }
}

// ---- The start ------------------------------------------------------------------------------------------------------

fn main() {
    let arguments: Vec<String> = std::env::args_os().skip(1).map(|it| it.to_string_lossy().into_owned()).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => serve(&SETTINGS),
        ["--help" | "-h"] => drop(write!(io::stdout(), "{HELP}")),
        ["--version" | "-V"] => drop(writeln!(io::stdout(), "kv-store {VERSION}")),
        ["--health"] => exit(if is_healthy(SETTINGS.listen) { 0 } else { 1 }),
        _ => fail(2, &format!("{}: expected --help, --version, --health or nothing", arguments.join(" "))),
    }
}

/// How often a node begins a round of meetings (R11).
const MEETING_INTERVAL: Duration = Duration::from_millis(250);

fn serve(Settings { listen, role, view, .. }: &'static Settings) {
    // PID 1 of a container ignores these signals unless it handles them. There is nothing to save.
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let _ = signal_hook::flag::register_conditional_shutdown(signal, 0, Arc::new(AtomicBool::new(true)));
    }
    let description = match role {
        Role::Main => "main instance".into(),
        Role::Follower(main) => format!("follower of {main}"),
        Role::Node(address) => format!("node {address} of {}", view.join(",")),
    };
    if *MAX_CONNECTIONS < MIN_CONNECTIONS {
        let files = rlimit::getrlimit(rlimit::Resource::NOFILE).map_or(0, |(soft, _)| soft);
        let least = OTHER_FILES + 3 * MIN_CONNECTIONS;
        fail(1, &format!("ulimit -n {files}: expected {least} or more open files, for {MIN_CONNECTIONS} connections"))
    }
    // Makes the allocator return large blocks to the system when they are freed, and join small ones at once
    // (mallopt(3)): where a million were freed, a later allocation would join them all and take a second.
    // SAFETY: mallopt may race with other threads that allocate. None has been started yet.
    unsafe { (libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10), libc::mallopt(libc::M_MXFAST, 0)) };
    configure_worker();
    may::go!(|| {
        loop {
            let _ = catch_unwind(connections::watch);
            pause(Duration::from_secs(1));
        }
    });
    // may shares its port (SO_REUSEPORT), and two stores would share the clients: try first without it.
    let server = TcpListener::bind(listen).map(drop).and_then(|()| Server.start(listen)).unwrap_or_else(|error| {
        let (ip, port) = (listen.ip(), listen.port());
        fail(1, &format!("IP={ip} PORT={port}: expected an address and port that can be listened on: {error}"))
    });
    say(&format!("{description}, version {VERSION}, listening on {listen}"));
    // If /dev/null cannot be opened, stderr stays as it is.
    let _ = keep_stderr();
    LazyLock::force(&BACKGROUND);
    repeat(Duration::ZERO, wake_sleepers);
    repeat(MEETING_INTERVAL, || block_on(keep_in_touch(&Live)));
    let _ = server.join();
    fail(1, &format!("IP={} PORT={}: expected to go on listening, but the server ended", listen.ip(), listen.port()))
}

/// Configures `may` with one worker thread, which runs all coroutines.
///
/// `may` 0.3.51 stores a coroutine that waits for a socket where the polling thread finds it, and then still uses the
/// socket's data (`subscribe` in its `io::sys::unix`). A second worker could run the coroutine to its end meanwhile,
/// which frees the data: the heap is corrupted within minutes of mixed load (`./test.sh sanitize`). With one worker,
/// the thread that would run it is still in `subscribe`. `may`'s timer thread must run no coroutine with a socket
/// either: so no `may::coroutine::sleep`, and no parking with a time limit. Timeouts of sockets are safe, since the
/// worker handles them.
fn configure_worker() {
    // The stack size is in words: 128 KiB of address space, of which only the pages in use take memory.
    may::config().set_workers(1).set_stack_size(16 << 10).set_worker_pin(false);
    // An idle worker polls once a second instead of a hundred times: whatever has work for it wakes it.
    may::config().set_timeout_ns(1_000_000_000);
}

const MIN_CONNECTIONS: u64 = 100;

/// Docker's health check. A connection to 0.0.0.0 or [::] goes to this machine.
fn is_healthy(listen: SocketAddr) -> bool {
    let request = Request { verb: "GET".into(), target: "/kv-store".into(), ..Request::default() };
    // A node whose table is not in force cannot answer for keys.
    let is_up = |body: &[u8]| !matches!(member(body, "incoming"), Ok(Some("null")));
    request.send(&listen.to_string()).is_ok_and(|answer| answer.status == 200 && is_up(&answer.body))
}

// ---- The simulation: whole stores in one process --------------------------------------------------------------------

#[cfg(test)]
mod simulation {
    //! Runs stores of two to five nodes through random schedules of faults: messages are lost, delayed or repeated;
    //! nodes pause, die and restart; links are cut, also in one direction; coordinators compete; views are changed by
    //! force. The nodes run the program's own code. Only the clock and the network are simulated. The invariants:
    //!
    //! - With one replica a shard, no two nodes answer for a key (`check_owners`).
    //! - An acknowledged write is on every replica that its node could reach (`note_acknowledged`), and is lost only
    //!   together with all nodes that had it (`lose`).
    //! - No client reads an older value than it knows of (`judge`). With one replica a shard, a client knows of all
    //!   that was acknowledged or read before it asked, so the store is linearizable in the order of stamps. With
    //!   several, it knows of what its session has seen and what that depends on, so the store is causally consistent.
    //! - When all faults end, all nodes adopt one table, every node answers for every key with nothing older than what
    //!   was acknowledged, replicas agree, contexts become empty, and tombstones are dropped (`heal`).
    //!
    //! `SEED=n` repeats one schedule and prints it. `SCHEDULES=n` runs that many, from `FIRST=m` on.

    use std::cell::{Cell, RefCell};
    use std::collections::{BTreeMap, BTreeSet};
    use std::future::poll_fn;
    use std::panic::AssertUnwindSafe;
    use std::pin::Pin;
    use std::rc::Rc;
    use std::sync::Mutex;
    use std::task::{self, Poll, Waker};
    use std::thread;

    use super::*;
    use crate::http::{Answer, Origin, Request, Resource, Vocabulary};
    use crate::membership::{answer_view_change, run};
    use crate::node::{Context, Envelope, Later, Message, Node, Place, Reply, node_of};
    use crate::records::{Record, Span, hash_of};
    use crate::replication::{Lost, World, get_key};
    use crate::service::{KeyRequest, wanted_view};
    use crate::table::{Table, Version};
    use crate::world::lock;

    const KEYS: usize = 6;
    const NAMES: [&str; KEYS] = ["k0", "k1", "k2", "k3", "k4", "k5"];
    static HASHES: LazyLock<[u64; KEYS]> = LazyLock::new(|| NAMES.map(|name| hash_of(name.as_bytes())));
    const ADDRESSES: [&str; 5] = ["n0:1", "n1:1", "n2:1", "n3:1", "n4:1"];
    const SESSIONS: usize = 3;

    fn machine_of(address: &str) -> usize {
        ADDRESSES.iter().position(|it| *it == address).expect("an address of a machine")
    }

    fn names(machines: &[usize]) -> Vec<String> {
        machines.iter().map(|it| ADDRESSES[*it].to_owned()).collect()
    }

    fn millis(count: usize) -> Duration {
        Duration::from_millis(count as u64)
    }

    /// Values are numbers with many digits, so that a message has room for one or two.
    fn number_in(value: &str) -> Option<usize> {
        value.trim_matches('"').parse().ok()
    }

    /// By key, the stamp of the record that a client knows of or a node has; 0 for none.
    type Stamps = [u64; KEYS];

    fn merge(known: &mut Stamps, more: &Stamps) {
        known.iter_mut().zip(more).for_each(|(known, stamp)| *known = *stamp.max(known));
    }

    /// The record of a key at a node.
    fn record(node: &Node, key: usize) -> Option<&Record> {
        node.records.get(HASHES[key], NAMES[key].as_bytes())
    }

    fn owns(node: &Node, key: usize) -> bool {
        node.table().is_some_and(|table| Some(table.shard_at(HASHES[key])) == node.shard)
    }

    /// Whether a node must get a key before it answers for it (R1).
    fn waits(node: &Node, key: usize) -> bool {
        !node.pull_needs(HASHES[key]).is_empty()
    }

    fn answers(node: &Node, key: usize) -> bool {
        owns(node, key) && node.place(HASHES[key]) == Place::Here && !waits(node, key)
    }

    /// Whether a stamp was given by this node.
    fn gave(node: &str, stamp: u64) -> bool {
        node_of(stamp) == node_of(hash_of(node.as_bytes()))
    }

    type Event = Box<dyn FnOnce(&Rc<Simulation>)>;
    /// By time, with a random number to break ties: the machine concerned, and the event.
    type Events = BTreeMap<(Duration, usize), (Option<usize>, Event)>;

    #[derive(Default)]
    struct Machine {
        /// None while it is dead.
        node: RefCell<Option<Node>>,
        /// Incremented when the node dies, which ends its tasks.
        life: Cell<u64>,
        /// Its events are delayed until then.
        asleep_until: Cell<Duration>,
        /// How far its clock is ahead. Chosen at each start, so the clock may be set back.
        ahead: Cell<Duration>,
        /// It uses a table of the store, and was not left out of a newer one without its knowledge. The contract
        /// promises nothing about the answers of other nodes.
        counts: Cell<bool>,
    }

    impl Machine {
        /// Whether the node is alive and satisfies a condition.
        fn is(&self, so: impl Fn(&Node) -> bool) -> bool {
            self.node.borrow().as_ref().is_some_and(so)
        }

        /// The stamp of its record of a key; 0 without one.
        fn stamp(&self, key: usize) -> u64 {
            self.node.borrow().as_ref().and_then(|node| record(node, key).map(Record::stamp)).unwrap_or(0)
        }

        fn stamps(&self) -> Stamps {
            std::array::from_fn(|key| self.stamp(key))
        }

        /// The same, but 0 for a tombstone.
        fn value_stamp(&self, key: usize) -> u64 {
            let has_value = self.is(|node| record(node, key).is_some_and(|record| !record.is_tombstone()));
            if has_value { self.stamp(key) } else { 0 }
        }
    }

    /// A client that sends the context of its last answer.
    #[derive(Clone, Default)]
    struct Session {
        /// The context without its braces.
        context: String,
        known: Stamps,
    }

    #[derive(Default)]
    struct Simulation {
        seed: u64,
        is_told: bool,
        /// Networks are cut often and for long, and nodes seldom die.
        is_cut_up: bool,
        /// Nodes die, but no message is lost or late, and nobody sleeps.
        is_steady: bool,
        /// The factor of the first table, and the nodes' lease of a lock.
        factor: usize,
        lease: Duration,
        machines: Vec<Machine>,
        random: Cell<u64>,
        now: Cell<Duration>,
        events: RefCell<Events>,
        /// The task that runs.
        task: RefCell<Option<Rc<Task>>>,
        cut: RefCell<BTreeSet<(usize, usize)>>,
        /// The percentage of messages lost, and the time before which none is lost or late.
        loss: usize,
        quiet_until: Cell<Duration>,
        /// The id of the store under test. Nodes that started alone have stores of their own.
        store: Cell<u64>,
        /// Whether a view was changed by force, which may give up any key.
        is_forced: Cell<bool>,
        /// By key and stamp, the values of all records ever seen; None is a tombstone.
        written: RefCell<[BTreeMap<u64, Option<usize>>; KEYS]>,
        /// By key, the highest stamp that was lost with all nodes that had it.
        lost: RefCell<Stamps>,
        /// The highest acknowledged stamps that are not lost.
        acknowledged: RefCell<Stamps>,
        /// What the client knew of, by the number of its request, which is also the value that it writes.
        known: RefCell<Vec<Stamps>>,
        sessions: RefCell<[Session; SESSIONS]>,
        /// The last answer, the number of view changes that succeeded, and of requests for keys answered.
        said: RefCell<String>,
        changes: Cell<u64>,
        answers: Cell<u64>,
    }

    // -- Tasks: the nodes' code, which waits for calls

    struct Task {
        machine: usize,
        life: u64,
        future: RefCell<Pin<Box<dyn Future<Output = ()>>>>,
    }

    impl Task {
        fn run(self: &Rc<Task>, simulation: &Simulation) {
            if simulation.machines[self.machine].life.get() == self.life {
                simulation.task.replace(Some(self.clone()));
                let _ = self.future.borrow_mut().as_mut().poll(&mut task::Context::from_waker(Waker::noop()));
                simulation.look_who_counts();
                simulation.check_owners();
            }
        }
    }

    /// An answer, and the stamp of what the request wrote.
    type Done = (Answer, u64);
    /// Ends a wait with a result, unless it has ended.
    type Caller = Rc<dyn Fn(&Simulation, Option<Done>)>;

    /// A node as its tasks see it.
    #[derive(Clone)]
    struct There {
        simulation: Rc<Simulation>,
        machine: usize,
        /// The stamp of what the request wrote, here or at the node that it was passed on to.
        wrote: Rc<Cell<u64>>,
    }

    impl World for There {
        fn with<T>(&self, action: impl FnOnce(&mut Node) -> T) -> T {
            let (simulation, machine) = (&self.simulation, &self.simulation.machines[self.machine]);
            let mut node = machine.node.borrow_mut();
            let node = node.as_mut().expect("only living nodes run");
            node.look_at_clock(simulation.now.get() + machine.ahead.get());
            let (before, sums) = (node.table(), node.records.total());
            let result = action(node);
            // A store's only node may have joined another store.
            if before.is_some_and(|table| table.lists(node.own()) && table.store == simulation.store.get()) {
                simulation.store.set(node.store());
            }
            if node.records.total() != sums {
                self.note_records(node);
            }
            let Later { lines, activities, .. } = std::mem::take(&mut node.later);
            lines.iter().for_each(|line| simulation.tell(|| format!("n{}: {line}", self.machine)));
            for activity in activities {
                simulation.spawn(self.machine, run(simulation.there(self.machine), activity));
            }
            result
        }

        async fn deliver(&self, envelopes: Vec<Envelope>) -> Vec<Option<Reply>> {
            let (mut calls, mut replies) = (Vec::new(), Vec::new());
            for envelope in envelopes {
                let body = postcard::to_stdvec(&envelope).expect("bytes");
                let message = Request { origin: Origin::Message, body, ..Request::default() };
                calls.push(self.call(&envelope.to, message, envelope.message.limit()));
            }
            for call in calls {
                replies.push(call.await.and_then(|(answer, _)| postcard::from_bytes(&answer.body).ok()));
            }
            replies
        }

        async fn relay(&self, node: &str, request: Request, patience: Duration) -> Result<Answer, Lost> {
            let call = self.call(node, request, patience.min(Duration::from_secs(3)));
            let (answer, stamp) = call.await.ok_or(Lost { was_sent: true })?;
            self.wrote.set(stamp);
            Ok(answer)
        }

        async fn sleep(&self, time: Duration) {
            self.simulation.wait(time).0.await;
        }
    }

    impl There {
        /// Sends a request to another machine, a message sometimes twice, and returns the answer. The machine of a dead
        /// node may refuse the connection.
        fn call(&self, node: &str, request: Request, limit: Duration) -> impl Future<Output = Option<Done>> + use<> {
            let (from, to, (result, caller)) = (self.machine, machine_of(node), self.simulation.wait(limit));
            let is_message = request.origin == Origin::Message;
            let is_repeated =
                is_message && !self.simulation.is_quiet() && self.simulation.percent(self.simulation.loss / 3);
            for _ in 0..if is_repeated { 2 } else { 1 } {
                let (request, caller) = (request.clone(), caller.clone());
                self.simulation.send(from, to, move |simulation| {
                    if simulation.is_alive(to) {
                        let there = simulation.there(to);
                        simulation.spawn(to, async move {
                            let answer = there.serve(request).await;
                            if is_message || there.simulation.machines[to].counts.get() {
                                let done = Some((answer, there.wrote.get()));
                                there.simulation.send(to, from, move |simulation| caller(simulation, done));
                            }
                        });
                    } else if simulation.percent(50) {
                        simulation.after(millis(1), Some(from), move |simulation| caller(simulation, None));
                    }
                });
            }
            result
        }

        /// Records what this node has now, and the stamp of what it has written.
        fn note_records(&self, node: &Node) {
            for (key, written) in self.simulation.written.borrow_mut().iter_mut().enumerate() {
                let Some(record) = record(node, key) else { continue };
                let (stamp, value) = (record.stamp(), number_in(&String::from_utf8_lossy(record.value())));
                // A stamp may be given again if all nodes that knew of it have died.
                if written.insert(stamp, value) != Some(value) && gave(node.own(), stamp) {
                    self.wrote.set(stamp);
                    let times = written.values().filter(|it| **it == value).count();
                    self.simulation.check(value.is_none() || times == 1, || format!("{value:?} is written twice"));
                }
            }
        }

        /// Judges an answer by what the client knew when it asked: a write is above that, and a read not below.
        fn judge(&self, number: usize, verb: &str, key: usize, session: usize, answer: &Answer) {
            let (simulation, name) = (&self.simulation, NAMES[key]);
            let body: serde_json::Value = serde_json::from_slice(&answer.body).expect("every answer is JSON");
            // A node that is relayed to counts.
            let counts = simulation.machines[self.machine].counts.get() || body.get("address").is_some();
            if !matches!(answer.status, 200 | 201 | 404) || !counts {
                return;
            }
            simulation.answers.update(|count| count + 1);
            let (written, lost) = (&simulation.written.borrow()[key], simulation.lost.borrow()[key]);
            let mut known = simulation.known.borrow()[number];
            let is_missing = answer.status == 404 || answer.status == 201 && simulation.factor == 1;
            if is_missing && known[key] > 0 {
                let deletion = written.range(known[key]..).find(|(_, value)| value.is_none());
                simulation.check(deletion.is_some(), || format!("{name} is not there: {body}"));
                // The node that answered may have died since, and the deletion with it.
                known[key] = deletion.map(|(stamp, _)| *stamp).filter(|stamp| *stamp > lost).unwrap_or(0);
            }
            let value = number_in(&body["value"].to_string());
            let read = written.iter().find(|(_, it)| value.is_some() && **it == value).map_or(0, |(stamp, _)| *stamp);
            let found = if verb == "GET" { read } else { self.wrote.get() };
            // A deletion may have got the stamp of one that is lost, and does not count as written then.
            let is_new = answer.status == 404 || found >= known[key] || verb == "DELETE" && found == 0;
            simulation.check(is_new, || format!("{name} is older than what is known: {body}"));
            if let Some(value) = value {
                merge(&mut known, &simulation.known.borrow()[value]);
            }
            if found > lost {
                known[key] = found.max(known[key]);
            }
            // With one replica a shard, all clients know of what one has read.
            if simulation.factor == 1 {
                merge(&mut simulation.acknowledged.borrow_mut(), &known);
            }
            let context = body.get("causal-context").map(|it| it.to_string().trim_matches(['{', '}']).to_owned());
            let context = context.unwrap_or_default();
            simulation.sessions.borrow_mut()[session] = Session { context, known };
        }

        /// Serves a request as the program does.
        async fn serve(&self, request: Request) -> Answer {
            if request.origin == Origin::Message {
                let envelope: Envelope = postcard::from_bytes(&request.body).expect("an envelope");
                self.simulation.tell(|| format!("  {envelope:.200?}"));
                return Answer::message(&self.with(|node| node.receive(envelope)));
            }
            let Resource::Key(key) = request.route().0 else {
                return match wanted_view(&request.body) {
                    Ok(wanted) => Box::pin(answer_view_change(self, &request, &wanted)).await,
                    Err(refusal) => refusal.answer(Vocabulary::Json, "PUT"),
                };
            };
            let index = NAMES.iter().position(|name| request.target.ends_with(name)).expect("one of the keys");
            let mut it = KeyRequest::new(request, key, Vocabulary::Json);
            let tried = self.with(|node| it.perform(node));
            let answer = Box::pin(it.answer(self, tried)).await.joined();
            // A node that relayed a request has acknowledged nothing.
            let is_own = !String::from_utf8_lossy(&answer.body).contains(r#""address""#);
            if is_own && answer.status < 300 && self.wrote.get() > 0 {
                self.simulation.note_acknowledged(self.machine, index, self.wrote.get());
            }
            answer
        }
    }

    impl Simulation {
        fn new(seed: u64, is_told: bool) -> Simulation {
            let start = Duration::from_secs(1_000_000);
            let factor = [1, 1, 2, 3][(seed % 4) as usize];
            let (is_cut_up, is_steady) = (factor > 1 && seed % 8 > 3, factor > 1 && seed % 16 < 4);
            let mut simulation = Simulation { seed, is_told, is_cut_up, is_steady, factor, ..Simulation::default() };
            simulation.random.set(seed.wrapping_mul(0x2545f4914f6cdd1d));
            simulation.now.set(start);
            simulation.quiet_until.set(start + millis(1600));
            simulation.machines.resize_with(2 + simulation.below(4), Machine::default);
            simulation.lease = millis([500, 3000, 5000, 10_000][simulation.below(4)]);
            simulation.loss = [0, 0, 5, 20][simulation.below(4)];
            simulation
        }

        fn below(&self, limit: usize) -> usize {
            self.random.update(|random| random.wrapping_add(0x9e3779b97f4a7c15));
            let mut mixed = self.random.get();
            mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58476d1ce4e5b9);
            mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d049bb133111eb);
            ((mixed ^ mixed >> 31) % limit as u64) as usize
        }

        fn percent(&self, percent: usize) -> bool {
            self.below(100) < percent
        }

        fn tell(&self, what: impl FnOnce() -> String) {
            if self.is_told {
                println!("{:8.3} {}", self.now.get().as_secs_f64(), what());
            }
        }

        fn check(&self, holds: bool, what: impl FnOnce() -> String) {
            assert!(holds, "SEED={}: at {:.3} {}", self.seed, self.now.get().as_secs_f64(), what());
        }

        // -- Time

        fn after(&self, time: Duration, on: Option<usize>, event: impl FnOnce(&Rc<Simulation>) + 'static) {
            let when = (self.now.get() + time, self.below(usize::MAX));
            self.events.borrow_mut().insert(when, (on, Box::new(event)));
        }

        /// Does one event. False if nothing is left to do.
        fn step(self: &Rc<Self>) -> bool {
            let Some(((time, _), (on, event))) = self.events.borrow_mut().pop_first() else { return false };
            self.now.set(time);
            match on.is_some_and(|on| self.is_asleep(on)) {
                true => self.after(Duration::from_micros(50_000 + self.below(3000) as u64), on, event),
                false => event(self),
            }
            true
        }

        fn pass(self: &Rc<Self>, time: usize) {
            let end = self.now.get() + millis(time);
            while self.now.get() < end && self.step() {}
        }

        /// Passes time until a condition holds. Fails if it does not within some seconds.
        fn pass_until(self: &Rc<Self>, seconds: usize, what: &str, holds: impl Fn() -> bool) {
            let end = self.now.get() + millis(1000 * seconds);
            while !holds() {
                self.check(self.now.get() < end, || what.to_owned());
                self.pass(1);
            }
        }

        fn spawn(&self, machine: usize, future: impl Future<Output = ()> + 'static) {
            let (life, future) = (self.machines[machine].life.get(), RefCell::new(Box::pin(future) as _));
            let task = Rc::new(Task { machine, life, future });
            self.after(Duration::ZERO, Some(machine), move |simulation| task.run(simulation));
        }

        /// Lets the running task wait for a result, which the caller delivers; for None after a time limit.
        fn wait(&self, limit: Duration) -> (impl Future<Output = Option<Done>> + use<>, Caller) {
            let task = self.task.borrow().clone().expect("only tasks wait");
            let (machine, place) = (task.machine, Rc::new(RefCell::new(None)));
            // The place is gone when the task no longer waits.
            let its_place = Rc::downgrade(&place);
            let caller: Caller = Rc::new(move |simulation, result| {
                let Some(place) = its_place.upgrade() else { return };
                place.borrow_mut().get_or_insert(result);
                drop(place);
                task.run(simulation);
            });
            let late = caller.clone();
            self.after(limit, Some(machine), move |simulation| late(simulation, None));
            (poll_fn(move |_| place.borrow_mut().take().map_or(Poll::Pending, Poll::Ready)), caller)
        }

        // -- Messages

        fn is_quiet(&self) -> bool {
            self.is_steady || self.now.get() < self.quiet_until.get()
        }

        /// Lets an event arrive at another machine, unless it is lost.
        fn send(&self, from: usize, to: usize, event: impl FnOnce(&Rc<Simulation>) + 'static) {
            let is_lost = !self.is_quiet() && self.percent(self.loss);
            let most = match self.below(100) {
                0 if !self.is_quiet() => 9_000_000,
                1..5 if !self.is_quiet() => 1_000_000,
                _ => 4_000,
            };
            let time = Duration::from_micros(self.below(most) as u64 + 100);
            if from == to || !is_lost && !self.cut.borrow().contains(&(from, to)) {
                self.after(time, Some(to), event);
            }
        }

        // -- Machines

        fn there(self: &Rc<Self>, machine: usize) -> There {
            There { simulation: self.clone(), machine, wrote: Rc::default() }
        }

        fn is_alive(&self, machine: usize) -> bool {
            self.machines[machine].is(|_| true)
        }

        fn is_asleep(&self, machine: usize) -> bool {
            self.now.get() < self.machines[machine].asleep_until.get()
        }

        fn start(self: &Rc<Self>, machine: usize, view: &[usize]) {
            // Clocks are wrong by up to ten minutes.
            let ahead = Duration::from_secs([0, 0, 300, 600][self.below(4)]);
            let incarnation = self.below(usize::MAX) as u64 | 1;
            self.tell(|| format!("n{machine} starts with {view:?}"));
            let (own, view, factor) = (ADDRESSES[machine].to_owned(), names(view), self.factor.min(view.len()));
            let mut node = Node::new(own, view, factor, incarnation, self.now.get() + ahead);
            node.lease = self.lease;
            self.machines[machine].node.replace(Some(node));
            self.machines[machine].ahead.set(ahead);
            let there = self.there(machine);
            self.spawn(machine, async move {
                loop {
                    keep_in_touch(&there).await;
                    there.sleep(MEETING_INTERVAL + millis(there.simulation.below(20))).await;
                }
            });
        }

        fn kill(&self, machine: usize) {
            self.tell(|| format!("n{machine} is killed"));
            let dead = &self.machines[machine];
            let stamps = dead.stamps();
            dead.node.take();
            if dead.counts.take() {
                self.lose(machine, stamps, false);
            }
            dead.life.update(|life| life + 1);
            dead.asleep_until.take();
        }

        // -- What is known of the store

        fn all(&self) -> std::ops::Range<usize> {
            0..self.machines.len()
        }

        fn first_view(&self) -> Vec<usize> {
            let count = self.machines.len();
            (0..if self.is_cut_up { count } else { count.div_ceil(2) }).collect()
        }

        /// The table that a machine uses, if it is one of the store under test.
        fn table(&self, machine: usize) -> Option<Arc<Table>> {
            let table = self.machines[machine].node.borrow().as_ref()?.table()?;
            (table.store == self.store.get()).then_some(table)
        }

        fn is_member(&self, machine: usize) -> bool {
            self.table(machine).is_some_and(|table| table.lists(ADDRESSES[machine]))
        }

        fn newest(&self) -> Option<Arc<Table>> {
            self.all().filter_map(|it| self.table(it)).max_by_key(|table| table.version)
        }

        /// Finds the machines that count. One that was left out as a silent node may lose what it has.
        fn look_who_counts(&self) {
            let newest = self.newest().unwrap_or_default();
            for (number, machine) in self.machines.iter().enumerate() {
                let (own, table) = (ADDRESSES[number], self.table(number));
                let is_left_out = table.as_ref().is_some_and(|table| {
                    let is_named = || newest.nodes(false).contains(&own.to_owned());
                    table.version.epoch < newest.version.epoch && table.lists(own) && !is_named()
                });
                if machine.counts.replace(table.is_some() && !is_left_out) && is_left_out {
                    self.tell(|| format!("n{number} is left out"));
                    self.lose(number, machine.stamps(), true);
                }
            }
        }

        /// With one replica a shard, no two nodes answer for a key.
        fn check_owners(&self) {
            for (key, name) in NAMES.iter().enumerate().filter(|_| self.factor == 1) {
                let is_owner = |it: &&Machine| it.counts.get() && it.is(|node| answers(node, key));
                let owners = self.machines.iter().filter(is_owner).count();
                self.check(owners < 2, || format!("{name} is answered for by {owners} nodes"));
            }
        }

        /// A machine that dies or is left out takes with it what no owner has, and what no owner can still get from a
        /// former owner. Without force, one that is left out takes only what it wrote while it was cut off.
        fn lose(&self, machine: usize, stamps: Stamps, is_left_out: bool) {
            let newest = self.newest();
            for (key, stamp) in stamps.into_iter().enumerate() {
                let is_asked = |node: &Node| {
                    let is_it = |it: &String| it == node.own();
                    let Some(newest) = &newest else { return false };
                    let is_source = newest.range_at(HASHES[key]).sources.iter().flatten().any(is_it);
                    // One that has started again may find that the table was settled, and the sources have nothing.
                    let is_behind = |owner: &Node| owner.version().is_some_and(|version| version < newest.version);
                    let asks = |owner: &Node| owner.pull_needs(HASHES[key]).iter().flatten().any(is_it);
                    let may_ask = |owner: &Node| asks(owner) || is_source && is_behind(owner);
                    newest.owners(HASHES[key]).iter().any(|owner| self.machines[machine_of(owner)].is(may_ask))
                };
                let may_give = |node: &Node| is_asked(node) || owns(node, key);
                let has_it = |it: &&Machine| it.counts.get() && it.is(may_give);
                let left = self.machines.iter().filter(has_it).map(|it| it.stamp(key)).max();
                if left.is_some_and(|left| left >= stamp) {
                    continue;
                }
                // With the last owner, its clock is lost too, and all knowledge of deletions.
                let last_written = || self.written.borrow()[key].keys().copied().max();
                let last = left.or_else(last_written).unwrap_or(0).max(stamp);
                // Former owners may have dropped what one of them had before.
                let owners = newest.iter().flat_map(|newest| newest.owners(HASHES[key]));
                let left = owners.map(|node| self.machines[machine_of(node)].stamp(key)).max().unwrap_or(0);
                let (mut acknowledged, mut lost) = (self.acknowledged.borrow_mut(), self.lost.borrow_mut());
                // The others may have dropped the same tombstone.
                let is_gone = left == 0 && self.written.borrow()[key].get(&stamp) == Some(&None);
                let may_go = !is_left_out || is_gone || self.is_forced.get() || gave(ADDRESSES[machine], stamp);
                self.check(may_go || acknowledged[key] != stamp, || format!("k{key} goes with n{machine}"));
                let forget = |known: &mut Stamps| known[key] = known[key].min(left);
                lost[key] = last.max(lost[key]);
                forget(&mut acknowledged);
                self.known.borrow_mut().iter_mut().for_each(forget);
                self.sessions.borrow_mut().iter_mut().for_each(|session| forget(&mut session.known));
            }
        }

        /// An acknowledged write is on every replica that the node that took it does not know to be silent. Where no
        /// message is lost, it is on all that have fetched from each other.
        fn note_acknowledged(&self, machine: usize, key: usize, stamp: u64) {
            let node = self.machines[machine].node.borrow();
            let node = node.as_ref().expect("it answers");
            if !owns(node, key) || !self.machines[machine].counts.get() {
                return;
            }
            let is_deleted = self.written.borrow()[key].range(stamp..).any(|(_, value)| value.is_none());
            for other in node.others().iter().filter(|other| self.is_steady || !node.is_silent(other)) {
                let it = &self.machines[machine_of(other)];
                let has_fetched = |other: &Node| !waits(other, key) && !other.incoming().contains(node.own());
                let should = it.is(|other| other.version() == node.version() && has_fetched(other));
                let has_it = it.stamp(key) >= stamp || it.stamp(key) == 0 && is_deleted;
                self.check(has_it || !should, || format!("n{machine} acknowledged what {other} does not have"));
            }
            let acknowledged = &mut self.acknowledged.borrow_mut()[key];
            *acknowledged = stamp.max(*acknowledged);
        }

        // -- Clients

        /// Sends a client's request to a node.
        fn ask(self: &Rc<Self>, machine: usize, verb: &'static str, key: usize, session: usize) {
            let number = self.known.borrow().len();
            let Session { context, mut known } = self.sessions.borrow()[session].clone();
            let mut members = Vec::new();
            if verb == "PUT" {
                members.push(format!(r#""value":"{number:020}""#));
            }
            // With one replica a shard, clients need no contexts.
            if self.factor == 1 {
                merge(&mut known, &self.acknowledged.borrow());
            } else {
                members.push(format!(r#""causal-context":{{{context}}}"#));
            }
            self.known.borrow_mut().push(known);
            let (body, target) = (format!("{{{}}}", members.join(",")), format!("/kv-store/keys/{}", NAMES[key]));
            let (content_type, bytes) = ("application/json".into(), body.clone().into());
            let request = Request { verb: verb.into(), target, content_type, body: bytes, ..Request::default() };
            let what = format!("{session}: {verb} k{key} {body}");
            self.submit(machine, request, what, move |there, answer| there.judge(number, verb, key, session, answer));
        }

        /// Lets a node serve a request, and notes what it says.
        fn submit(
            self: &Rc<Self>,
            at: usize,
            request: Request,
            what: String,
            then: impl Fn(&There, &Answer) + 'static,
        ) {
            let there = self.there(at);
            self.spawn(at, async move {
                let answer = there.serve(request).await;
                let text = format!("{} {}", answer.status, String::from_utf8_lossy(&answer.body).trim());
                there.simulation.tell(|| format!("n{at} answers {what}: {text}"));
                there.simulation.said.replace(text);
                then(&there, &answer);
            });
        }

        /// Sends a write that a node of this store has passed on. It was received then.
        fn relay(self: &Rc<Self>, machine: usize, store: u64, began: Option<i64>) {
            let (verb, target, origin) = ("PUT".into(), "/kv-store/keys/k0".into(), Origin::Node(store));
            let (content_type, body) = ("application/json".into(), br#"{"value":true}"#.into());
            let request = Request { verb, target, content_type, body, origin, began, ..Request::default() };
            self.submit(machine, request, "a node".into(), |_, _| ());
        }

        fn change(self: &Rc<Self>, machine: usize, view: &[usize], factor: Option<usize>, force: bool) {
            self.is_forced.update(|is_forced| is_forced || force);
            let (names, factor) = (names(view), factor.map_or("null".into(), |factor| factor.to_string()));
            let what = format!(r#"{{"view":{names:?},"force":{force},"repl-factor":{factor}}}"#);
            self.tell(|| format!("n{machine} is asked for {what}"));
            let (verb, target, body) = ("PUT".into(), "/kv-store/view-change".into(), what.clone().into());
            let request = Request { verb, target, body, ..Request::default() };
            self.submit(machine, request, what, |there, answer| {
                there.simulation.changes.update(|count| count + u64::from(answer.status == 200));
            });
        }

        // -- Trouble

        fn cause_trouble(self: &Rc<Self>) {
            let count = self.machines.len();
            let (roll, one, other) = (self.below(100), self.below(count), self.below(count));
            // Where links are cut, most of the other events are requests.
            let roll = if self.is_cut_up && self.percent(85) { 91 * usize::from(roll >= 95) } else { roll };
            if roll < 84 && (!self.is_alive(one) || self.is_asleep(one)) {
                return;
            }
            match roll {
                // A blank node relays.
                0..62 if self.machines[one].is(|node| node.store() == self.store.get()) => {
                    let verb = ["PUT", "PUT", "GET", "GET", "DELETE"][self.below(5)];
                    let key = self.below(if self.is_cut_up { 3 } else { KEYS });
                    self.ask(one, verb, key, self.below(SESSIONS));
                }
                62..78 => self.change_at_random(one),
                78..84 if !self.is_steady => {
                    self.tell(|| format!("n{one} sleeps"));
                    let time = millis([200, 1000, 3000, 15_000][self.below(4)] + self.below(500));
                    self.machines[one].asleep_until.set(self.now.get() + time);
                }
                84..91 => {
                    let dying = match self.below(7) {
                        0 => self.first_view(),
                        1 => vec![one, other],
                        _ => vec![one],
                    };
                    let time = millis([10, 200, 2000, 6000][self.below(4)]);
                    for machine in dying.into_iter().filter(|it| self.is_alive(*it)) {
                        self.kill(machine);
                        self.after(time, None, move |simulation| simulation.start_again(machine));
                    }
                }
                91.. if !self.is_steady => self.cut_or_heal(one, other),
                _ => {}
            }
        }

        fn change_at_random(self: &Rc<Self>, at: usize) {
            let (force, is_careful) = (self.percent(25), self.percent(50));
            // Force is for nodes that are dead.
            let is_wanted = |it: &usize| match force {
                true => self.is_alive(*it),
                false => self.percent(65) && (!is_careful || self.is_alive(*it)),
            };
            let view: Vec<usize> = self.all().filter(is_wanted).collect();
            // A store with one replica a shard keeps that factor, since it is judged by other rules.
            let least = self.factor.min(2);
            let factor = Some(2 + self.below(2)).filter(|it| least > 1 && *it <= view.len() && self.percent(30));
            // A node outside the store is only asked to join it, not to begin another.
            if view.len() >= least && (self.is_member(at) || view.iter().any(|it| self.is_member(*it))) {
                self.change(at, &view, factor, force);
            }
        }

        /// Cuts a few links, half of them in one direction only, or heals all. After that, sometimes a node leaves at
        /// once.
        fn cut_or_heal(self: &Rc<Self>, one: usize, other: usize) {
            if self.cut.borrow().len() <= self.below(if self.is_cut_up { 4 } else { 1 }) {
                self.cut.borrow_mut().insert((one, other));
                if self.percent(50) {
                    self.cut.borrow_mut().insert((other, one));
                }
            } else {
                self.cut.take();
                if self.is_cut_up && self.percent(10) && one != other && self.is_alive(one) {
                    let staying: Vec<usize> = self.all().filter(|it| *it != other).collect();
                    self.change(one, &staying, None, false);
                }
            }
            self.tell(|| format!("cut are {:?}", self.cut.borrow()));
        }

        /// Starts a machine again, with its first view, the present one, or none. If all nodes of its view are blank
        /// too, members of the present table must reach it within a second (the contract), so no message is lost then.
        fn start_again(self: &Rc<Self>, machine: usize) {
            if self.is_alive(machine) {
                return;
            }
            let (first, newest) = (self.first_view(), self.newest());
            let in_force = newest.as_ref().map(|table| table.view.iter().map(|it| machine_of(it)).collect());
            let present: Vec<usize> = in_force.unwrap_or(first.clone());
            let view = match self.below(if first.len() > 1 { 4 } else { 1 }) {
                1 if newest.is_some() && present.contains(&machine) => vec![machine],
                2 | 3 => first,
                _ => present.clone(),
            };
            let knows = |it: &usize| present.contains(it) && newest.is_some() && self.table(*it) == newest;
            if !view.iter().any(|it| *it != machine && knows(it)) {
                self.end_trouble(millis(1600));
            }
            self.start(machine, &view);
        }

        /// Ends all faults for some time.
        fn end_trouble(&self, time: Duration) {
            self.machines.iter().for_each(|it| it.asleep_until.set(Duration::ZERO));
            self.cut.take();
            self.quiet_until.update(|until| until.max(self.now.get() + time));
        }

        /// Starts all machines: those in the first view with it, others alone.
        fn begin(self: &Rc<Self>) {
            let first = self.first_view();
            for machine in self.all() {
                self.start(machine, if first.contains(&machine) { &first } else { std::slice::from_ref(&machine) });
            }
            self.store.set(Table::first(names(&first), self.factor.min(first.len())).store);
            self.pass(1600);
        }

        fn run(self: &Rc<Self>) {
            self.begin();
            let end = self.now.get() + millis([2000, 3000, 5000, 12_000][self.below(4)]);
            while self.now.get() < end {
                self.pass(self.below(50));
                if self.now.get() > self.quiet_until.get() {
                    self.cause_trouble();
                }
            }
            self.heal();
            // They refer to the simulation, which would not be freed.
            self.events.take();
            self.task.take();
        }

        /// Ends all faults. Soon every node must answer for every key.
        fn heal(self: &Rc<Self>) {
            self.tell(|| "all is well".into());
            self.end_trouble(Duration::from_hours(1));
            self.all().for_each(|machine| self.start_again(machine));
            // If all died at once, each may have started with another view.
            if !self.all().any(|it| self.is_member(it)) {
                return;
            }
            // A node that was cut off may have made a store of its own with nodes that had left this one.
            let is_other = |table: Arc<Table>| table.store != self.store.get() && table.view.len() > 1;
            let has_other = |machine: &Machine| machine.is(|node| node.table().is_some_and(is_other));
            let is_divided = || self.machines.iter().any(has_other);
            let has_table = |machine: &Machine| machine.is(|node| node.table().is_some());
            self.pass_until(120, "the nodes do not come to go by one table", || {
                is_divided() || self.is_settled() && self.machines.iter().all(has_table)
            });
            if is_divided() {
                return;
            }
            self.pass_until(5, "the replicas do not agree", || self.is_settled() && self.agrees());
            // Nodes of a first view that all restart while others remove them by force are a store of their own.
            let is_in_it = |it: Arc<Table>| it.view.iter().any(|node| self.machines[machine_of(node)].counts.get());
            // A late lock keeps a node from answering, or from learning that it has left.
            for (round, time) in [9000 + self.lease.as_millis() as usize, 2500].into_iter().enumerate() {
                self.pass(time);
                for session in 0..if self.factor > 1 { SESSIONS } else { 1 } {
                    merge(&mut self.sessions.borrow_mut()[session].known, &self.acknowledged.borrow());
                    for machine in self.all().filter(|it| self.table(*it).is_some_and(is_in_it)) {
                        self.read_all(machine, session);
                        let context = self.sessions.borrow()[session].context.clone();
                        self.check(round == 0 || context.is_empty(), || format!("a healthy store needs {context}"));
                    }
                }
            }
            self.check(self.agrees(), || "the replicas do not agree in the end".into());
            for (number, machine) in self.machines.iter().enumerate() {
                let has_tombstone = (0..KEYS).any(|key| machine.stamp(key) != machine.value_stamp(key));
                self.check(!has_tombstone, || format!("n{number} keeps a tombstone"));
            }
        }

        fn read_all(self: &Rc<Self>, machine: usize, session: usize) {
            for (key, name) in NAMES.iter().enumerate() {
                let before = self.answers.get();
                self.ask(machine, "GET", key, session);
                let what = format!("{name} is not answered for at n{machine} in the end");
                self.pass_until(6, &what, || self.answers.get() > before);
            }
        }

        /// Whether all members of the newest table use it and have all that it gives them.
        fn is_settled(&self) -> bool {
            let Some(newest) = self.newest() else { return false };
            let has_all = |it: &Node| it.settled && it.may_answer() && it.incoming().is_empty();
            let is_so = |it: &Node| it.version() == Some(newest.version) && has_all(it);
            newest.view.iter().all(|node| self.machines[machine_of(node)].is(is_so))
        }

        /// Whether some machines have the same value of a key.
        fn is_same(&self, key: usize, machines: impl Iterator<Item = usize>) -> bool {
            let stamps: BTreeSet<u64> = machines.map(|machine| self.machines[machine].value_stamp(key)).collect();
            stamps.len() == 1
        }

        /// Whether all replicas have the same values.
        fn agrees(&self) -> bool {
            let newest = self.newest().unwrap_or_default();
            let replicas = |key: usize| newest.owners(HASHES[key]).iter().map(|node| machine_of(node));
            (0..KEYS).all(|key| self.is_same(key, replicas(key)))
        }
    }

    // -- Directed schedules

    /// A store of four nodes without keys, after a script.
    fn store_of_four(factor: usize, script: &str) -> Rc<Simulation> {
        let lease = Duration::from_secs(10);
        let mut it = Simulation { factor, is_cut_up: true, is_steady: false, lease, ..Simulation::new(2, false) };
        it.machines.resize_with(4, Machine::default);
        it.quiet_until.set(Duration::MAX);
        let it = Rc::new(it);
        it.begin();
        it.play(script);
        it
    }

    impl Simulation {
        /// Runs a script. Each step is a verb or a condition, and numbers, mostly of machines; times are in
        /// milliseconds. A condition must hold, or must not hold after `not`. `until` passes time until it holds.
        fn play(self: &Rc<Self>, script: &str) {
            for step in script.split(", ") {
                let mut words = step.split([' ', '-', '.']).peekable();
                let is_wanted = words.next_if_eq(&"not").is_none();
                let may_take_time = words.next_if_eq(&"until").is_some();
                let verb = words.next().expect("a verb");
                let numbers: Vec<usize> = words.map(|word| word.parse().expect("a number")).collect();
                let holds = || self.act(verb, &numbers) == is_wanted;
                match may_take_time {
                    true => self.pass_until(5, step, holds),
                    false => self.check(holds(), || format!("not so: {step} in {script}")),
                }
            }
        }

        /// What happens to the store.
        fn act(self: &Rc<Self>, verb: &str, numbers: &[usize]) -> bool {
            match (verb, numbers) {
                ("fill", []) => (0..KEYS).for_each(|key| self.ask(0, "PUT", key, 0)),
                ("pass", &[time]) => self.pass(time),
                // Cuts the links of these pairs, and heals all others.
                ("cut", pairs) => {
                    let both = pairs.chunks(2).flat_map(|it| [(it[0], it[1]), (it[1], it[0])]);
                    self.cut.replace(both.collect());
                }
                ("kill", machines) => machines.iter().for_each(|it| self.kill(*it)),
                ("start", &[machine]) => self.start(machine, &[0, 1, 2, 3]),
                ("start", [machine, view @ ..]) => self.start(*machine, view),
                ("alone", [it]) => self.play(&format!("kill 0 1 2 3, start {it} {it}, until table {it} 0")),
                ("sleep", &[machine]) => self.machines[machine].asleep_until.set(Duration::MAX),
                ("wake", &[machine]) => self.machines[machine].asleep_until.set(Duration::ZERO),
                ("change" | "force", [machine, view @ ..]) => self.change(*machine, view, None, verb == "force"),
                ("factor", [factor, machine, view @ ..]) => self.change(*machine, view, Some(*factor), false),
                ("put", &[machine]) => self.ask(machine, "PUT", 0, 0),
                ("get", &[machine]) => self.ask(machine, "GET", 0, 0),
                ("delete", &[machine]) => self.ask(machine, "DELETE", 0, 0),
                ("read", &[machine]) => self.read_all(machine, 0),
                // A write that was passed on by a node of the store, by one of another store, and long ago.
                ("relay", &[machine]) => self.relay(machine, self.store.get(), None),
                ("stray", &[machine]) => self.relay(machine, 7, None),
                ("late", &[machine]) => self.relay(machine, self.store.get(), Some(0)),
                // The client has a context that names this table.
                ("claim", parts) => {
                    let context = Context { table: Some(version(parts)), ..Context::default() };
                    let bytes = postcard::to_stdvec(&context).expect("bytes");
                    self.sessions.borrow_mut()[0].context = format!(r#""bytes":{bytes:?}"#);
                }
                _ => return self.holds(verb, numbers),
            }
            true
        }

        /// What is so in the store.
        fn holds(self: &Rc<Self>, what: &str, numbers: &[usize]) -> bool {
            let newest = self.newest().unwrap_or_default();
            let has_value = |machine: usize, key| self.machines[machine].value_stamp(key) > 0;
            match (what, numbers) {
                // The number of requests answered, and of successful view changes.
                ("answered", &[count]) => self.answers.get() == count as u64,
                ("changed", &[count]) => self.changes.get() == count as u64,
                // The last answer, which may name a node.
                ("status", [status]) => self.said.borrow().starts_with(&status.to_string()),
                ("down", &[machine]) => self.said.borrow().contains(&format!("{} is down", ADDRESSES[machine])),
                ("foreign", &[machine]) => self.said.borrow().contains(&format!("{} holds keys", ADDRESSES[machine])),
                ("epoch", &[epoch]) => newest.version.epoch == epoch as u64,
                ("settled", []) => self.is_settled(),
                // It has a value of each key for which it answers.
                ("complete", &[machine]) => {
                    let must_have = |key| self.machines[machine].is(|node| answers(node, key));
                    (0..KEYS).all(|key| has_value(machine, key) || !must_have(key))
                }
                // The owners have a value of each key. The newest table was planned for this number of keys.
                ("kept", []) => {
                    let has_it = |node: &String, key| has_value(machine_of(node), key);
                    (0..KEYS).all(|key| newest.owners(HASHES[key]).iter().all(|node| has_it(node, key)))
                }
                ("counted", &[count]) => newest.counts.iter().sum::<usize>() == count,
                // The machines have no value of the first key. They have the same.
                ("gone", machines) => machines.iter().all(|it| !has_value(*it, 0)),
                ("same", machines) => self.is_same(0, machines.iter().copied()),
                // It gives a key, or lets fetch.
                ("gives", &[machine, asker, key, for_context, wrong]) => {
                    let message = Message::GiveKey(NAMES[key].as_bytes().to_vec().into(), for_context > 0);
                    matches!(self.exchange(asker, machine, wrong, message), Reply::Key(_))
                }
                ("lets", &[machine, asker]) => {
                    let message = Message::Digests(Span { first: 0, last: 9 });
                    matches!(self.exchange(asker, machine, 0, message), Reply::Digests(..))
                }
                (_, [machine, more @ ..]) => self.there(*machine).with(|node| is_so(node, what, more)),
                _ => panic!("what is {what}?"),
            }
        }

        /// A question by the same table. It may be to another incarnation (1), or from another one (2).
        fn exchange(self: &Rc<Self>, from: usize, to: usize, wrong: usize, message: Message) -> Reply {
            let mut envelope = self.there(from).with(|node| node.compose(ADDRESSES[to], message));
            self.there(to).with(|node| {
                envelope.to_incarnation = node.status().incarnation + u64::from(wrong == 1);
                envelope.incarnation += u64::from(wrong == 2);
                node.receive(envelope)
            })
        }
    }

    /// What is so at a node.
    fn is_so(node: &mut Node, what: &str, numbers: &[usize]) -> bool {
        match (what, numbers) {
            // It has no table, or the one with this number.
            ("blank", []) => node.table().is_none(),
            ("table", &[number]) => node.version().is_some_and(|it| it.number == number as u64),
            ("answering", []) => node.may_answer(),
            ("here", &[key]) => node.place(HASHES[key]) == Place::Here,
            ("ready", []) => node.is_ready(),
            // The nodes that it pulls from, or asks while it is blank.
            ("pulls", nodes) => node.incoming().into_iter().eq(names(nodes)),
            ("asks", nodes) => node.begin_round() == Some(names(nodes)),
            ("silent", &[other]) => node.is_silent(ADDRESSES[other]),
            ("has", &[key]) => record(node, key).is_some(),
            ("lags", nodes) => node.lagging.iter().eq(&names(nodes)),
            // It claims that its write of a key is stable. It has heard an excessive claim.
            ("stable", &[key]) => {
                let stamp = record(node, key).map_or(0, Record::stamp);
                let table = node.table().expect("a table");
                let place = table.view.iter().position(|it| it == node.own()).expect("a member");
                node.status().stable_at[place] >= stamp
            }
            ("believes", &[other]) => node.status().stable_at[other] == u64::MAX / 2,
            // It tells others of a table that it has heard of, and of the nodes of that.
            ("tells", [number, nodes @ ..]) => {
                let it = node.status();
                (it.promised, it.asked_for_lock, it.first) == (version(&[*number, 9]), names(nodes), 0)
            }
            // By a context with a stamp of the writer, a read of k1 needs these nodes.
            ("needs", [writer, time, nodes @ ..]) => {
                let context = seen(node, ADDRESSES[*writer], *time);
                let groups = nodes.iter().map(|it| names(&[*it])).collect();
                node.context_needs(HASHES[1], NAMES[1].as_bytes(), &context) == Some(groups)
            }
            ("plausible", &[writer, time]) => {
                let context = seen(node, ADDRESSES[writer], time);
                node.is_plausible(&context)
            }
            _ => replicates(node, what, numbers),
        }
    }

    /// What a node does with records.
    fn replicates(node: &mut Node, what: &str, numbers: &[usize]) -> bool {
        match (what, numbers) {
            ("write", &[key]) => {
                let record = Record::new(NAMES[key].as_bytes(), "true");
                node.write(HASHES[key], record, &Context::default());
            }
            // These nodes lack its write. All others have it; or had it in another incarnation (1), or table (2).
            ("lacks", [key, wrong, nodes @ ..]) => {
                let (record, by) = (record(node, *key).expect("a record").clone(), node.version());
                let incarnation = |it: &String| node.incarnation_of(it) + u64::from(*wrong == 1);
                let of = |it: String| (it.clone(), (incarnation(&it), by.filter(|_| *wrong != 2)));
                let stored = node.others().into_iter().map(of).collect();
                return node.lacking(&record, &stored) == Ok(names(nodes));
            }
            ("abandon", [key, nodes @ ..]) => {
                let record = record(node, *key).expect("a record").clone();
                node.give_up(&record, &names(nodes));
            }
            ("compares", &[other]) => return node.begin_to_reconcile(ADDRESSES[other]),
            // It reconciles, through all or not. Meanwhile, a push fails (1), or it adopts a table (2). Then the other
            // one lacks nothing more.
            ("reconciles", &[other, is_through, trouble]) => {
                let begins = node.begin_to_reconcile(ADDRESSES[other]);
                let begins_another = node.begin_to_reconcile(ADDRESSES[other]);
                let _ = match trouble {
                    0 => true,
                    1 => replicates(node, "abandon", &[0, other]),
                    _ => changes(node, "adopts", &[4, 9]),
                };
                node.reconciled(ADDRESSES[other], is_through > 0);
                return begins && !begins_another && !node.lagging.contains(ADDRESSES[other]);
            }
            // It gets a record in a reconciliation, or by a pull.
            ("gets", &[from, number, key, time, by_pull]) => {
                let mut record = Record::new(NAMES[key].as_bytes(), "7");
                record.set_stamp(*seen(node, ADDRESSES[from], time).seen.values().next().expect("a stamp"));
                let copies = [(record, Context::default())];
                return node.take_reconciled(Some(by(node, number)), ADDRESSES[from], &copies, by_pull > 0);
            }
            _ => return changes(node, what, numbers),
        }
        true
    }

    /// What a node does about locks and tables. Returns whether it grants or adopts.
    fn changes(node: &mut Node, what: &str, numbers: &[usize]) -> bool {
        match (what, numbers) {
            ("locks", [from, parts @ ..]) => {
                receive(node, *from, 0, Message::Lock(version(parts), names(&[0, 1, 2])));
                node.status().promised == version(parts)
            }
            ("release", parts) => {
                matches!(receive(node, 1, 0, Message::Lock(version(parts), Vec::new())), Reply::Met(..))
            }
            ("surveys", parts) => {
                let reply = receive(node, 1, 0, Message::Survey(version(parts), Vec::new()));
                matches!(reply, Reply::Surveyed(..))
            }
            // It begins a change to the first three nodes, by force or not, and by this version.
            ("begins", &[force, epoch, number]) => {
                let view = names(&[0, 1, 2]);
                let begun = node.begin_change(&view, force > 0).map(|(_, it)| (it.epoch, it.number));
                let begins_another = node.begin_change(&view, force > 0).is_some();
                node.coordinating = false;
                begun == Some((epoch as u64, number as u64)) && !begins_another
            }
            // A table made from its own one; with this view; with a source for all keys; of another base.
            ("adopts", &[number, coordinator]) => node.adopt(next_table(node, &[number, coordinator], &[])),
            ("leaves", [number, view @ ..]) => {
                let base = node.version().expect("a table");
                node.adopt(Arc::new(Table { base, ..Table::clone(&first_table(*number, view)) }))
            }
            ("joins", [number, sources @ ..]) => node.adopt(next_table(node, &[*number, 7], sources)),
            ("errs", [number, sources @ ..]) => {
                let table = next_table(node, &[*number, 7], sources);
                node.adopt(Arc::new(Table { base: version(&[1, 1]), ..Table::clone(&table) }))
            }
            // Its own table, for which it began to lock some time ago.
            ("makes", &[number, coordinator, ago]) => {
                node.adopt_own(next_table(node, &[number, coordinator], &[]), node.now - millis(ago))
            }
            _ => hears(node, what, numbers),
        }
    }

    /// What a node hears of others.
    fn hears(node: &mut Node, what: &str, numbers: &[usize]) -> bool {
        match (what, numbers) {
            ("meet", &[from]) => drop(receive(node, from, 0, Message::Meet(status_of(&[0; 4])))),
            // A reply of some incarnation, to a question of some time ago. It is the one that counts then.
            ("reply", &[from, incarnation, ago]) => {
                node.note_incarnation(ADDRESSES[from], incarnation as u64, node.now - millis(ago));
                return node.incarnation_of(ADDRESSES[from]) == incarnation as u64;
            }
            ("hear", [from, status @ ..]) => {
                node.note_incarnation(ADDRESSES[*from], 3, node.now);
                node.hear(ADDRESSES[*from], &status_of(status));
            }
            ("told", [from, number, view @ ..]) => node.hear_of_table(ADDRESSES[*from], first_table(*number, view)),
            // Rounds of a start. The last one has these answers: then it adopts a table.
            ("rounds", &[count]) => (0..count).for_each(|_| drop(node.begin_round())),
            ("takes", answers) => {
                let answer = |it: &[usize]| (ADDRESSES[it[0]].to_owned(), status_of(&it[1..]));
                let answers: BTreeMap<String, node::Status> = answers.chunks(5).map(answer).collect();
                answers.iter().for_each(|(from, status)| node.note_incarnation(from, status.incarnation, node.now));
                node.take_up_table(&answers);
                return node.table().is_some();
            }
            // Another node has answered, or not, what it was asked some time ago. It was met.
            ("back", &[other]) => node.note_answer(ADDRESSES[other], node.now, true),
            ("fails", &[other, ago]) => node.note_answer(ADDRESSES[other], node.now - millis(ago), false),
            ("met", &[other, ago]) => node.note_meeting(ADDRESSES[other], node.now - millis(ago)),
            // A round of its pull: the other node did not answer (0), was incomplete (1), or was whole (2).
            ("found", &[other, what, number]) => {
                let found = [None, Some(node::Giver::Incomplete), Some(node::Giver::Whole)][what];
                let pull = node.pulls_left(by(node, 0)).remove(0);
                node.note_received(by(node, number), &pull, &[(ADDRESSES[other].to_owned(), found)]);
            }
            // It learns that its table is settled, and its writes that it drops are lacking nowhere.
            ("settle", keys) => {
                let records: Vec<Record> = keys.iter().filter_map(|key| record(node, *key).cloned()).collect();
                node.settle();
                return records.iter().all(|it| node.lacking(it, &BTreeMap::new()) == Ok(Vec::new()));
            }
            _ => panic!("what is {what} {numbers:?}?"),
        }
        true
    }

    /// Number, coordinator, epoch.
    fn version(parts: &[usize]) -> Version {
        let part = |index| parts.get(index).map_or(0, |it| *it as u64);
        Version { number: part(0), coordinator: part(1), epoch: part(2) }
    }

    /// The version of a table: its own one for 0.
    fn by(node: &Node, number: usize) -> Version {
        if number > 0 { version(&[number, 7]) } else { node.version().expect("a table") }
    }

    /// A status: the numbers of the table that the node uses and of the lock that it has granted, its rounds (after
    /// the first it is ready), and the factor of its first table of two nodes; 0 for none.
    fn status_of(numbers: &[usize]) -> node::Status {
        let &[number, promised, rounds, factor] = numbers else { panic!("no status: {numbers:?}") };
        node::Status {
            incarnation: 3,
            version: (number > 0).then(|| version(&[number, 9])),
            store: first_table(0, &[0, 1, 2, 3]).store,
            promised: version(&[promised, 9]),
            asked_for_lock: names(if promised > 0 { &[2] } else { &[] }),
            first: if factor > 0 && rounds > 4 { Table::first(names(&[0, 1]), factor).store } else { 0 },
            is_ready: rounds > 0,
            stable_at: vec![u64::MAX / 2; 4],
            ..node::Status::default()
        }
    }

    /// A table of another store, with n3 as a source.
    fn first_table(number: usize, view: &[usize]) -> Arc<Table> {
        let mut table = Table { version: version(&[number, 9]), ..Table::first(names(view), 2) };
        table.ranges[0].sources = vec![names(&[3])];
        Arc::new(table)
    }

    /// A table made from the one that a node goes by, with one group of sources for all keys, or none.
    fn next_table(node: &Node, parts: &[usize], sources: &[usize]) -> Arc<Table> {
        let table = node.table().expect("a table");
        let mut next = Table { version: version(parts), base: table.version, ..Table::clone(&table) };
        let groups = if sources.is_empty() { Vec::new() } else { vec![names(sources)] };
        next.ranges.iter_mut().for_each(|range| range.sources = groups.clone());
        Arc::new(next)
    }

    fn receive(node: &mut Node, from: usize, to_incarnation: u64, message: Message) -> Reply {
        let (from, to) = (ADDRESSES[from].to_owned(), node.own().to_owned());
        node.receive(Envelope { from, to, version: None, incarnation: 3, to_incarnation, message })
    }

    /// A context with a stamp of a writer. The time is in milliseconds; 10,000 is the node's clock.
    fn seen(node: &mut Node, writer: &str, time: usize) -> Context {
        let bits = node_of(hash_of(writer.as_bytes()));
        let stamp = ((node.status().clock >> 12) + 1000 * time as u64 - 10_000_000) << 12 | u64::from(bits);
        Context { seen: [(bits, stamp)].into(), table: None }
    }

    /// Each with the factor of the first table. The comments say what the schedule must show. `2.7` is the version of
    /// table 2 of coordinator 7, and four numbers with points are a status (`status_of`).
    const SCRIPTS: &str = "
        # Two sides of a cut, each with a replica of each shard, do not both change the view.
        2: cut 0-1 0-3 2-1 2-3, change 0 0 2, change 1 1 3, pass 8000, change 0 0 2, change 1 1 3, pass 8000, changed 0
        # A replica that has not fetched yet vouches for nobody: the other one of its shard sleeps.
        2: sleep 0, kill 1, start 1, pass 3000, change 2 1 2 3, pass 8000, changed 0, wake 0, pass 5000, read 2
        # It goes on fetching by a newer table.
        2: cut 0-1, kill 1, start 1, pass 3000, change 2 0 1 2 3, pass 3000, table 1 1, complete 1
        # A replica is ready when it has all that a whole one has. Here n1 is filled from nobody, and n0 from n1 alone;
        # then n1 gets all from n2, the last one that has it, which is killed.
        3: change 0 0 1 2, pass 3000, kill 1, start 1, until table 1 1, cut 1-0 1-2 1-3, pass 3000, kill 0, cut 1-2, \
           start 0, until table 0 1, cut 0-2 1-2 0-3, pass 2500, not ready 0, cut 0-1 0-2 0-3, pass 3000, kill 2, \
           cut 0-1, start 2, until table 2 1, cut 0-1 1-2, pass 3000, not ready 0
        4: kill 3, kill 0, cut 3-1 3-2, start 3, start 0, until table 0 0, cut 3-1 3-2 0-1 0-2, pass 3000, not ready 0
        2: cut 0-1, kill 1, start 1, pass 3000, change 2 2 3, pass 16, cut 0-1 0-2 0-3, pass 3000, not ready 2
        # A node that starts waits for a newer table that others have granted a lock for: only n0 and n1 know it, and n1
        # has given its keys away when it is killed.
        1: change 0 0 2 3, until table 0 1, cut 0-2 0-3 1-2 1-3, pass 500, kill 1, start 1, cut 0-1 0-2 0-3, \
           pass 3000, blank 1, pass 11000, change 2 0 1 2 3, pass 6000, blank 1
        # A key stays deleted where a node that left while it was cut off joins again: first it drops what it had.
        1: change 0 0 1 3, until table 0 1, until table 1 1, until table 3 1, until pulls 0, until pulls 1, \
           until pulls 3, cut 2-0 2-1 2-3, delete 0, pass 3000, cut, change 0 0 1 2 3, pass 6000, changed 2, \
           gone 0 1 2 3
        # A node that starts again beside too many dead ones relays.
        4: kill 1 2 3, start 1, pass 3000, blank 1, put 1, pass 100, status 200, get 1, pass 100, status 200, blank 1
        # A view change that failed keeps no node from starting again.
        2: kill 1, pass 3000, kill 3, change 0 0 2 3, pass 9000, changed 0, start 3, pass 3000, table 3 0, pulls 3
        # What a dead node wrote spreads without it.
        2: change 0 0 1 2, pass 2000, cut 0-2, put 0, pass 1500, kill 0, pass 5000, same 1 2
        # A deleted key stays deleted, however long a replica is cut off.
        4: cut 0-3 1-3 2-3, delete 0, pass 40000, cut, pass 5000, same 0 1 2 3
        # A key that may exist where it cannot be asked for is deleted there, too.
        2: delete 2, pass 9000, cut 2-3, pass 2000, put 3, pass 500, delete 2, pass 1500, cut, pass 5000, gone 2 3
        # A node that starts again gets deletions as well.
        4: cut 0-3 1-3 2-3, delete 0, pass 1500, kill 2, start 2, pass 3000, gone 2, cut 0-2 1-2 0-3 1-3, pass 5000, \
           gone 2
        # What a node takes late reaches the others: n0 writes to n1 alone, starts again, and finds n2 and n3 first.
        4: cut 0-2 0-3 1-2 1-3, put 0, pass 1500, cut 1-0 1-2 1-3, kill 0, start 0, pass 3000, cut, pass 9000, \
           same 0 1 2 3
        4: cut 0-2 0-3 1-2 1-3, put 0, pass 1500, cut 1-0 1-2 1-3, kill 0, start 0, pass 2940, cut, pass 9000, \
           same 0 1 2 3
        # A replica that is cut off from others while it starts keeps nobody from writing.
        4: kill 3, cut 3-1 3-2, start 3, pass 1500, put 0, pass 300, answered 7
        # Who has not fetched from a replica that it does not reach is not ready by the next table either.
        2: cut 0-1, kill 0, start 0, pass 3000, factor 1 2 0 1 2 3, pass 3000, not ready 0
        # A table that is made from one that is not settled has its sources as well.
        1: change 0 0 1 2, pass 4000, cut 3-1 3-2, change 0 0 1 2 3, pass 1000, kill 3, pass 3000, force 0 0 1 2, \
           pass 3000, kept
        # A silent node that stays is named, by force as well.
        2: kill 1, pass 3000, force 0 0 1 2 3, pass 6000, changed 0, down 1
        # A blank node does not count for the majority: it would grant both sides.
        3: change 0 0 1 2, pass 3000, cut 0-1 1-2, kill 2, start 2, pass 1500, change 0 0 2, pass 8000, changed 1, \
           down 1
        # A change waits for a majority while a node starts. By force, a blank node stays in the view.
        2: cut 0-1 1-2, pass 3000, kill 3, start 3, change 0 0 2 3, pass 9000, changed 1
        2: kill 1 2 3, start 1, pass 3000, blank 1, force 0 0 1, pass 6000, settled
        # Keys are counted at a replica that has them.
        2: cut 0-1, kill 0, start 0, pass 3000, not ready 0, change 2 0 1 2 3, pass 100, counted 6
        # A node that a lock did not reach is not silent if it answers.
        2: cut 0-2, change 0 0 1 2 3, pass 700, cut, pass 5000, changed 1
        # Silent nodes may leave where another replica of their shard answers. That begins a new epoch.
        2: change 0 0 1 2, pass 3000, kill 3, change 0 0 1, pass 5000, settled
        2: kill 1, change 0 0 2 3, pass 9000, epoch 1
        # From a table that is not settled another one is made by force only, and only if that leaves out a silent node.
        1: cut 3-1 3-2, change 0 0 1 2, pass 1000, force 0 0 1, pass 8000, table 0 1
        1: cut 3-1 3-2, change 0 0 1 2, pass 1000, kill 3, pass 3000, force 0 0 1, pass 8000, epoch 1, settled
        2: change 0 0 1, pass 3000, change 0 0 1 2 3, until table 0 2, kill 3, pass 5000, change 0 0 1 2, pass 9000, \
           changed 2, status 409
        2: change 2 1 3, until table 1 1, kill 0, pass 5000, not settled, force 2 1 3, pass 8000, settled, kept
        2: change 2 1 3, until table 1 1, kill 0, pass 5000, force 1 1 3, pass 8000, settled, kept
        # A replica that starts again gets by the next table, too, what the other one wrote by the one before.
        2: change 0 0 1, pass 3000, change 0 2 3, until table 2 2, kill 1, pass 3000, delete 2, pass 500, kill 2, \
           start 2, until table 2 2, sleep 3, pass 2000, wake 3, force 2 2 3, until table 2 3, until pulls 2, gone 2
        # Sources that have started again have nothing; what another replica got of them is left.
        2: change 0 0 1, pass 3000, change 0 2 3, until table 3 2, cut 3-0 3-1, until table 2 2, until pulls 2, \
           kill 0, kill 1, start 0 0, start 1 1, pass 2000, cut, until pulls 3, complete 3
        # A replica that has kept its records waits for nobody.
        2: change 0 0 1 2 3, until table 0 1, kill 1, pass 3000, ready 0
        # When a table is settled, nobody waits for those who left.
        2: change 0 0 1 2, pass 3000, kill 3, kill 1, start 1, pass 3000, pulls 1
        # Who was asleep meets somebody before it answers, or finds nobody for a second.
        2: sleep 0, pass 3000, cut 0-1 0-2 0-3, wake 0, pass 250, not answering 0, pass 1500, answering 0, cut, \
           sleep 0, pass 3000, wake 0, pass 500, answering 0
        # A joining replica does not wait for another one that dies while the keys come in.
        2: change 0 0 1, pass 3000, kill 3, start 3 3, pass 3000, change 0 0 1 2 3, until table 3 2, kill 2, \
           pass 3000, ready 3
        # A node that has just started may join; one with keys of its own may not.
        1: change 0 0 1 2, pass 3000, kill 3, start 3 3, change 0 0 1 2 3, pass 6000, changed 2
        1: change 0 0 1 2, pass 3000, kill 3, cut 3-0 3-1 3-2, start 3 3, pass 2000, put 3, pass 200, cut, \
           change 0 0 1 2 3, pass 200, changed 1, table 0 1, foreign 3
        # One that is blank has not started yet; one of a store of several keeps to it.
        1: change 0 0 1, pass 3000, kill 2 3, cut 1-3, start 3 2 3, pass 2000, change 0 0 1 3, \
           pass 6000, changed 1, down 3
        1: change 0 0 1, pass 3000, kill 2 3, cut 2-0 2-1 3-0 3-1, start 2 2 3, start 3 2 3, pass 3000, cut, \
           change 0 0 1 2, pass 200, changed 1, foreign 2
        # One whose table is above those of the store may join.
        1: change 1 1 2 3, pass 3000, kill 0, cut 0-1 0-2 0-3, start 0 0, pass 2000, change 0 0, pass 100, \
           change 0 0, pass 100, change 0 0, pass 100, cut, change 1 0 1 2 3, pass 6000, changed 5
        # One that another node still pulls from, or that pulls from another one itself, does not join.
        1: change 0 0 1 3, pass 3000, kill 2, cut 2-0 2-1 2-3, start 2 2, pass 2000, put 2, cut 1-3, \
           change 0 0 1, pass 1000, change 2 2 3, pass 6000, changed 1, cut, pass 9000, changed 2, kept
        1: change 0 0 1, pass 3000, kill 2 3, cut 2-0 2-1 3-0 3-1, start 2 2 3, start 3 2 3, pass 3000, put 2, \
           pass 200, change 2 2, until table 2 1, cut 2-3, pass 1000, change 0 0 1 2, pass 200, foreign 2
        # One that left by the base, and has its keys still, may join again by force.
        1: cut 3-1, change 0 0 1 2, pass 1000, kill 1, pass 3000, force 0 0 2 3, pass 6000, table 3 2
        # The same view evens out what drifted, also through a node that learns only now of the table with that view.
        1: change 0 0 1, pass 3000, cut 2-0 2-1 2-3, change 0 0 1, pass 3000, cut, change 2 0 1, pass 1000, changed 3, \
           table 0 3
        # One that has left and starts again is told, also where its view names only nodes that left.
        1: change 0 2 3, pass 3000, kill 0 1, start 0 0 1, start 1 0 1, pass 3000, table 0 1, table 1 1
        # A node that has left does not coordinate, also where it reaches no member: it may have missed tables.
        1: change 0 0, pass 3000, cut 1-0 1-3, change 0 0 3, pass 3000, kill 0, start 0 0, change 1 0 1, pass 800, \
           cut, pass 6000, changed 2
        # A coordinator that has missed a table learns of it from whoever joined by that.
        1: change 1 1 2 3, pass 3000, change 2 0 1 2 3, until table 2 2, cut 1-0 1-2 1-3, pass 11000, cut, \
           change 1 0 1 2, pass 9000, changed 3
        # A lock excludes other coordinators; the highest one counts, until it is released.
        2: locks 2 1 2.7, not locks 2 1 3.8, locks 2 1 2.7, locks 2 1 3.7, not locks 2 1 2.7, not surveys 2 9.9, \
           release 2 2.7, not locks 2 1 4.8, release 2 3.7, locks 2 1 4.8, not adopts 2 3.7, not makes 2 5.8 0
        # After 10 s it excludes nobody, and is used for 8 s. It does not exclude other tables of its coordinator.
        2: locks 2 1 4.8, pass 11000, not makes 2 4.8 8001, adopts 2 2.7
        2: locks 2 1 9.8, adopts 2 3.8, not locks 2 1 10.7
        # Who has granted the lock for a table is alive, and so is who fetches.
        2: fails 2 1 0, silent 2 1, adopts 2 2.7, fails 2 1 1, not silent 2 1
        2: fails 2 3 0, silent 2 3, lets 2 3, fails 2 3 1, not silent 2 3
        # A write that is in flight fails if the node adopts a table of another base, and so drops its records.
        2: cut 2-3, put 2, pass 10, errs 2 5, gone 2, cut, pass 3000, status 503
        # A node that may join takes no writes until its coordinator says that nothing came of that.
        1: alone 3, here 3 0, locks 3 0 2.9, hear 3 0 1.0.0.0, not here 3 0, pass 11000, hear 3 1 1.0.0.0, \
           hear 3 0 2.0.0.0, not here 3 0, hear 3 0 1.0.0.0, here 3 0, locks 3 3 3.9, here 3 0, write 3 0, \
           locks 3 0 4.9, here 3 0
        # A first table must be settled.
        2: kill 0 1 2 3, start 0, start 1, start 2, start 3, until table 0 0, not here 0 1
        # Who was asleep meets another one that is awake.
        1: alone 3, sleep 3, pass 3000, wake 3, locks 3 0 2.7, told 3 0 2 0 3, not answering 3, met 3 3 0, \
           met 3 1 0, met 3 0 2000, not answering 3, met 3 0 0, answering 3
        # A node takes a table of another store only if it joins that, or has left its own store.
        1: alone 2, told 2 0 9 0 1 2, table 2 9
        1: alone 2, told 2 0 9 0 1 3, not table 2 9, write 2 0, told 2 0 9 0 1 2, not table 2 9, leaves 2 1 0 1, \
           gone 2, told 2 4 9 0 1 3, not table 2 9, told 2 4 9 0 1 2, table 2 9
        1: alone 2, leaves 2 1 0 1, told 2 0 9 0 1 3, table 2 9
        1: alone 3, joins 3 1 0 3, ready 3, joins 3 2 0, told 3 0 9 0 1 3, not table 3 9
        # A pull needs a whole node, and all others of the group, of which each is incomplete twice.
        1: alone 3, joins 3 2 0 1, found 3 0 0 0, found 3 0 2 7, not ready 3, found 3 0 2 0, ready 3, found 3 1 1 0, \
           pulls 3 1, found 3 1 1 0, pulls 3
        2: errs 2 7 1, found 2 1 2 0, not ready 2
        # A blank node asks those that it has heard of, and goes by the newest table if most of its nodes answer.
        2: kill 0 1 2 3, start 0 0 1, told 0 2 3 2 3, asks 0 1, told 0 1 1 0 1, told 0 1 3 0 1 2 3, told 0 1 2 0 1 4, \
           asks 0 1 2 3, hear 0 4 3.0.0.0, asks 0 1 2 3 4, tells 0 3 0 1 2 3, not takes 0 1.3.0.0.0, \
           not takes 0 1.3.0.0.0 2.0.0.9.0 4.4.0.0.0, not takes 0 1.3.0.0.0 2.3.4.0.0, takes 0 1.3.0.0.0 2.0.0.9.0
        # If there is a lock for a newer one, all must answer, for a second.
        2: kill 0 1 2 3, start 0 0 1, rounds 0 2, hear 0 1 3.5.0.0, told 0 4 1 0 4, asks 0 1 2 3 4, told 0 1 3 1 4, \
           asks 0 1 2 3 4, not takes 0 2.3.4.0.0 3.3.4.0.0 4.3.4.0.0, \
           not takes 0 1.3.4.0.0 2.3.4.0.0 3.3.4.0.0 4.3.4.0.0, rounds 0 1, \
           takes 0 1.3.4.0.0 2.3.4.0.0 3.3.4.0.0 4.3.4.0.0, table 0 3
        # It asks who was asked for a lock with it. It pulls from the other replicas as well.
        2: kill 0 1 2 3, start 0 0 1, fails 0 3 0, locks 0 3 2.9, asks 0 1 2, meet 0 3, not silent 0 3, \
           told 0 1 2 0 1 3, takes 0 1.2.0.0.0 3.0.0.9.0, pulls 0 1 3
        # A node of its view may have left, and begun another store: it looks for its own one for a second.
        2: kill 0 1 2 3, start 0 0 1, told 0 1 1 1 4, not takes 0 1.1.0.0.0 4.1.0.0.0, rounds 0 5, \
           takes 0 1.1.0.0.0 4.1.0.0.0
        1: change 0 0 2, pass 3000, kill 1, cut 1-0 1-2 1-3, start 1 1, pass 3000, cut, kill 0, start 0 0 1, put 0, \
           pass 2000, not has 1 0, status 200
        # A table that nobody goes by is forgotten. A first table needs all nodes of the view, blank for a second too.
        2: kill 0 1 2 3, start 0 0 1, rounds 0 6, told 0 1 3 0 1 2 3, not takes 0 1.0.0.9.0 2.0.0.9.0, asks 0 1, \
           not takes 0 1.0.0.9.2, rounds 0 9, not takes 0, not takes 0 1.0.0.9.1, not takes 0 1.0.0.1.2, \
           not takes 0 1.0.0.9.0, takes 0 1.0.0.9.2
        2: kill 0 1 2 3, start 3 0 1, rounds 3 9, not takes 3 0.0.0.9.2 1.0.0.9.2
        2: kill 0 1 2 3, start 0 0 1, pass 3000, start 1 0 1, pass 700, blank 0, until table 0 0
        # A view change is above all that its coordinator knows, in a new epoch if it leaves out silent nodes.
        2: hear 0 2 5.0.0.0, begins 0 0 0 6, hear 0 2 5.6.0.0, begins 0 0 0 7, locks 0 1 8.7, begins 0 0 0 9, \
           begins 0 1 1 9, fails 0 1 0, begins 0 0 0 9, fails 0 3 0, begins 0 0 1 9, locks 0 1 9.7.1, begins 0 0 1 10
        # Messages are answered by one table and within one incarnation; a key is not given for a context by a node
        # that still waits for one of several, nor by a source that was killed.
        2: gives 2 3 0 0 0, not gives 2 3 0 0 1, not gives 2 3 0 0 2
        4: pass 5000, meet 0 3, not reply 0 3 5 9000, lags 0, reply 0 3 5 0, lags 0 3, meet 0 3, not reply 0 3 3 1, \
           reply 0 3 5 1, reply 0 3 3 0
        4: kill 3, cut 3-1, start 3, pass 3000, ready 3, gives 3 0 0 0 0, not gives 3 0 0 1 0
        2: change 2 2 3, pass 2000, kill 1, start 1, pass 4000, table 1 1, table 2 1, not gives 1 2 1 0 0
        # What a write lacks, and what is stable. A claim is below the clocks of the others, and never falls.
        4: pass 5000, write 0 0, write 0 1, pass 1000, not stable 0 0, lacks 0 0 1 1 2 3, lacks 0 0 2 1 2 3, \
           abandon 0 1 2, abandon 0 0 2, lags 0 2, not stable 0 0, not lacks 0 0 0
        4: pass 5000, stable 0 0, write 0 1, abandon 0 1, not stable 0 1, abandon 0 0 2, stable 0 0, adopts 0 3.9, \
           not stable 0 0, hear 0 1 3.0.0.0, not believes 0 1
        # Who reconciles, and when that counts.
        4: pass 5000, not reconciles 0 3 1 0, abandon 0 0 2, fails 0 2 0, not reconciles 0 2 1 0, back 0 2, \
           not reconciles 0 2 0 0, not reconciles 0 2 1 1, adopts 0 3.9, hear 0 2 4.0.1.0, not reconciles 0 2 1 0, \
           hear 0 2 3.0.0.0, not reconciles 0 2 1 0, hear 0 2 3.0.1.0, reconciles 0 2 1 0, abandon 0 0 2, \
           not reconciles 0 2 1 2
        4: pass 5000, write 0 0, abandon 0 0 2, compares 0 2, lags 0, pass 1000, not stable 0 0
        # What a replica takes from another one, the others may lack; but not what is stable, or older than what it has.
        4: pass 5000, not gets 0 1 7 0 10001 0, gets 0 1 0 0 0 0, write 0 0, gets 0 1 0 0 9990 0, lags 0, \
           gets 0 1 0 0 10001 0, lags 0 2 3
        4: delete 0, pass 15000, gets 0 1 0 0 0 0, not has 0 0, adopts 0 2.7, gets 0 1 0 0 0 0, has 0 0
        # A write that was dropped since the owners have got it is not pushed any more.
        4: pass 5000, write 3 1, leaves 3 8 0 1 2, not lacks 3 1 0, settle 3 1
        # What is stable is taken by a pull, if that covers the key.
        2: pass 15000, cut 0-1, kill 1, start 1, pass 3000, gets 1 0 0 1 0 0, gets 1 0 0 0 0 1, not has 1 1, \
           not has 1 0, gets 1 0 0 1 0 1, has 1 1, needs 1 1 10001 0
        # A read needs the writers in its context that may know of a newer record.
        2: pass 15000, needs 0 0 10001, needs 0 1 10001 1, needs 0 2 10001, needs 0 4 10001 1, needs 2 4 0, \
           not plausible 0 2 7210000, write 0 1, needs 0 1 9999, joins 0 2 2, needs 0 2 10001 2, needs 0 1 10001 1 2, \
           settle 0, needs 0 2 10001
        # A table in a context that nobody goes by is believed in until all nodes have answered.
        2: claim 9.9, get 2, pass 1500, status 200
        2: kill 1, pass 3000, claim 9.9, get 2, pass 1500, status 400
        # A request is passed on once, within a store, and not too late.
        2: relay 2, pass 100, status 200, put 0, pass 100, status 200, relay 0, pass 100, status 421, stray 2, \
           pass 100, status 421, late 2, pass 100, status 503
    ";

    #[test]
    fn scripts() {
        let is_script = |line: &&str| !line.is_empty() && !line.starts_with('#');
        for line in SCRIPTS.lines().map(str::trim).filter(is_script) {
            let (factor, script) = line.split_once(": ").expect("a factor");
            store_of_four(factor.parse().expect("a number"), &format!("fill, pass 500, {script}"));
        }
    }

    #[test]
    fn a_node_that_was_left_out_while_its_view_was_blank_asks_its_store() {
        let mut node = Node::new(ADDRESSES[0].into(), names(&[0, 1]), 2, 5, Duration::from_secs(1000));
        let shards = vec![names(&[2, 3])];
        let table = Table { version: version(&[3, 9]), view: names(&[2, 3]), shards, ..Table::clone(&node.first) };
        node.hear_of_table(ADDRESSES[2], Arc::new(table));
        assert_eq!(node.begin_round(), Some(names(&[1, 2, 3])));
    }

    #[test]
    fn what_a_context_has() {
        let by = |number| Context { table: Some(version(&[number, 7])), ..Context::default() };
        let (none, value) = (Context::default(), || Record::new(NAMES[1].as_bytes(), "true"));
        // n0 and n1 have the key.
        store_of_four(2, "fill, pass 5000").there(0).with(|node| {
            // The context of a write goes with the record, and into the context of its readers.
            let of = seen(node, ADDRESSES[2], 10_005);
            let written = node.write(HASHES[1], value(), &of);
            assert!(of.seen.values().all(|stamp| *stamp < written.stamp()) && node.copy_of(&written).1 == of);
            let after = node.context_after(&none, Some(&written));
            assert_eq!((after.seen.len(), after.table), (2, None));
            // A copy of a record that was replaced is the new one: the old one has no context any more.
            let newer = node.write(HASHES[1], value(), &of);
            let copy = node.copy_of(&written);
            assert_eq!((copy.0.stamp(), copy.1), (newer.stamp(), of));
            let mut copy = (value(), seen(node, ADDRESSES[2], 10_005));
            copy.0.set_stamp(written.stamp() + (1 << 20));
            assert!(node.take(&copy, false) && node.copy_of(&copy.0).1 == copy.1);
            // What is stable is left out, and of unknown writers the latest counts.
            let stable = seen(node, ADDRESSES[1], 0);
            assert_eq!(node.unstable_part(&stable), none);
            let (mut two, other) = (seen(node, ADDRESSES[4], 10_005), seen(node, "other:1", 10_006));
            two.seen.extend(&other.seen);
            assert_eq!(node.unstable_part(&two), other);
            let ahead = seen(node, ADDRESSES[1], 1 << 20);
            node.context_after(&ahead, None);
            assert!(ahead.seen.values().all(|stamp| node.status().clock >= *stamp));
            // A context has the table, until that is settled.
            node.adopt(next_table(node, &[2, 7], &[2]));
            let written = node.write(HASHES[1], value(), &none);
            assert_eq!((node.copy_of(&written).1, node.context_after(&none, None)), (by(2), by(2)));
            let written = node.write(HASHES[1], value(), &by(9));
            assert_eq!(node.context_after(&none, Some(&written)).table, by(9).table);
            assert_eq!(node.unstable_part(&by(2)), by(2));
            node.settle();
            assert_eq!((node.unstable_part(&by(2)), node.unstable_part(&by(9))), (none.clone(), by(9)));
            let written = node.write(HASHES[1], value(), &none);
            assert_eq!(node.copy_of(&written).1, none);
        });
    }

    #[test]
    fn a_key_counts_only_from_a_node_that_goes_by_the_same_table_and_has_not_restarted() {
        for adopts in [true, false] {
            // n0 has a new value, and sleeps while n1 asks for it.
            let it = store_of_four(2, "fill, pass 3000, write 0 1, sleep 0");
            let (there, got) = (it.there(1), Rc::new(Cell::new(false)));
            let result = got.clone();
            it.spawn(1, async move { result.set(get_key(&there, b"k1", &names(&[0]), false).await.is_some()) });
            it.play(if adopts { "pass 10, adopts 1 2.7, wake 0" } else { "pass 10, wake 0" });
            // n0 also answers what n1 asks it in meetings: each answer is followed by the news.
            for _ in 0..1000 {
                it.step();
                it.there(1).with(|node| {
                    if !adopts {
                        node.note_incarnation(ADDRESSES[0], 0, node.now);
                    }
                });
            }
            assert!(!got.get());
        }
    }

    #[test]
    fn a_change_moves_no_more_keys_than_it_must_and_deals_out_keys_and_hashes() {
        for case in 0..64 {
            let it = store_of_four(1, "pass 0");
            for round in 0..4 {
                let table = it.newest().expect("a table");
                for number in 0..[0, 1, 2, 3, 7, 10, 100, 400][case % 8] {
                    let key = format!("{case} {round} {number}");
                    let hash = hash_of(key.as_bytes());
                    it.there(machine_of(&table.owners(hash)[0])).with(|node| {
                        let write = node.write(hash, Record::new(key.as_bytes(), "1"), &Context::default());
                        assert_eq!(node.lacking(&write, &BTreeMap::new()), Ok(Vec::new()));
                    });
                }
                let size = |machine: usize| it.there(machine).with(|node| node.sums().count);
                let total: usize = it.all().map(size).sum();
                let view: Vec<usize> = it.all().filter(|machine| it.percent(60) || *machine == round).collect();
                let (least, rest) = (total / view.len(), total % view.len());
                // What nodes have above their target, if those with most keys may keep one more.
                let mut held: Vec<usize> = view.iter().map(|machine| size(*machine)).collect();
                held.sort_by_key(|count| std::cmp::Reverse(*count));
                let stays = held.iter().enumerate().map(|(rank, count)| (*count).min(least + usize::from(rank < rest)));
                for moved in [total - stays.sum::<usize>(), 0] {
                    let before = it.newest();
                    it.change(machine_of(&table.view[0]), &view, None, false);
                    let is_settled = || it.machines.iter().all(|machine| machine.is(|node| node.settled));
                    it.pass_until(60, "no change", || it.newest() != before && is_settled());
                    let table = it.newest().expect("a table");
                    assert_eq!(table.moved, moved, "case {case}, round {round}");
                    for (shard, machine) in view.iter().enumerate() {
                        let size = size(*machine);
                        assert!((least..=least + 1).contains(&size), "case {case}: {size} of {total}");
                        let width: u64 = table.spans_of(Some(shard)).iter().map(Span::width).sum();
                        let part = width as f64 / u64::MAX as f64 * view.len() as f64;
                        assert!((0.49..2.01).contains(&part), "case {case}: {part} of its part of the hashes");
                    }
                }
            }
        }
    }

    // -- Random schedules

    fn number(variable: &str) -> Option<u64> {
        std::env::var(variable).ok()?.parse().ok()
    }

    #[test]
    fn random_schedules() {
        let (seed, first) = (number("SEED"), number("FIRST").unwrap_or(0));
        let is_told = seed.is_some();
        let seeds = seed.map_or(first..first + number("SCHEDULES").unwrap_or(10_000), |seed| seed..seed + 1);
        let (count, seeds, totals) = (seeds.end - seeds.start, Mutex::new(seeds), Mutex::new((0, 0)));
        let run_some = || {
            loop {
                let Some(seed) = lock(&seeds).next() else { return };
                let simulation = Rc::new(Simulation::new(seed, is_told));
                if catch_unwind(AssertUnwindSafe(|| simulation.run())).is_err() {
                    *lock(&seeds) = 0..0;
                    panic!("SEED={seed} repeats it");
                }
                let (changes, answers) = &mut *lock(&totals);
                *changes += simulation.changes.get();
                *answers += simulation.answers.get();
            }
        };
        thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(run_some))));
        let (changes, answers) = *lock(&totals);
        println!("{count} schedules: {changes} view changes, {answers} requests answered");
        // A simulation in which nothing happens would pass as well.
        assert!(count < 1000 || 2 * changes > count && answers > 10 * count);
    }
}

// ---- Unit tests -----------------------------------------------------------------------------------------------------

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read;
    use std::net::{Shutdown, TcpStream};

    use super::*;
    use crate::http::MAX_VALUE;
    use crate::records::{ALL, Record, Records, Span, hash_of};

    #[test]
    fn records_are_a_map_in_the_order_of_hashes() {
        assert_eq!(hash_of(b""), 0x1e924b9d737700d7, "SipHash-2-4 with a zero key");
        let (mut records, mut model) = (Records::default(), BTreeMap::new());
        let random = |number: u64| hash_of(&number.to_be_bytes());
        for number in 0..60_000 {
            let (key, has_value) = ((random(2 * number) % 40_000).to_string(), random(2 * number + 1) % 3 > 0);
            let mut record = Record::new(key.as_bytes(), if has_value { "1" } else { "" });
            record.set_stamp(number);
            let old = model.insert(record.hash(), (number, !has_value));
            assert_eq!(old, records.insert(record.hash(), record).map(|it| (it.stamp(), it.is_tombstone())));
            let some = model.iter().nth(number as usize % 7).map(|(hash, it)| (*hash, *it));
            let Some((hash, (stamp, is_tombstone))) = some else { continue };
            records.remove_tombstone(hash, stamp + 1);
            records.remove_tombstone(hash, stamp);
            if is_tombstone {
                model.remove(&hash);
            }
        }
        for number in 0..200 {
            let (one, other) = (random(number), random(number + 200));
            let mut span = Span { first: one.min(other), last: one.max(other) };
            let expected = model.range(span.first..=span.last);
            assert_eq!(records.sums_of(span).count, expected.clone().filter(|(_, (_, is_gone))| !is_gone).count());
            let (mut given, mut last) = (Vec::new(), None);
            while last != Some(span.last) {
                span.first = last.map_or(span.first, |last| last + 1);
                let (some, until) = records.first_of(span, 5000);
                given.extend(some.iter().map(|record| (record.hash(), record.stamp())));
                last = Some(until);
            }
            assert!(given.into_iter().eq(expected.map(|(hash, (stamp, _))| (*hash, *stamp))));
        }
        records.remove(ALL);
        assert!(records.total() == Default::default());
    }

    /// Connects to a main instance in this process. A shell cannot be such a client: it sends too slowly, and closes
    /// both directions of a connection at once.
    fn connect() -> TcpStream {
        static SERVED: LazyLock<SocketAddr> = LazyLock::new(|| {
            let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).unwrap();
            configure_worker();
            Server.start(free).unwrap();
            repeat(Duration::ZERO, wake_sleepers);
            free
        });
        let client = TcpStream::connect(*SERVED).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client
    }

    fn get(key: &str) -> String {
        format!("GET /kv-store/{key} HTTP/1.1\r\nHost: a\r\n\r\n")
    }

    /// The head of a PUT whose body has this length.
    fn put_head(key: &str, length: usize) -> String {
        format!("PUT /kv-store/{key} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n")
    }

    #[test]
    fn requests_that_come_with_the_end_of_the_stream_are_answered() {
        for round in 0..300 {
            let half_a_body = put_head("none", 50) + "val=";
            let last = ["", &half_a_body, "GET /kv-store/none HT", "hello\r\n\r\n"][round % 4];
            // What is no request is refused if it is the first one.
            let (requests, refusals) = if round % 4 > 1 { (0, 1) } else { (1 + round % 3, 0) };
            let (mut client, mut answers) = (connect(), String::new());
            client.write_all((get("none").repeat(requests) + last).as_bytes()).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            client.read_to_string(&mut answers).unwrap();
            let counts = ["HTTP/1.1 404 ", "HTTP/1.1 400 "].map(|status| answers.matches(status).count());
            assert_eq!(counts, [requests, refusals], "{last}: {answers}");
        }
    }

    #[test]
    fn answers_do_not_wait_for_the_next_body() {
        let (mut client, mut buffer) = (connect(), vec![0; 1 << 16]);
        let mut exchange = |request: String, answers: usize| {
            client.write_all(request.as_bytes()).unwrap();
            // There is a brace at each end of an answer's body, and nowhere else in these.
            let mut ends = 0;
            while ends < answers {
                let count = client.read(&mut buffer).unwrap();
                assert!(count > 0, "{ends} answers");
                ends += buffer[..count].iter().filter(|byte| **byte == b'}').count();
            }
            assert_eq!(ends, answers);
        };
        exchange(get("none") + &put_head("late", 5), 1);
        exchange("val=1".into(), 1);
        exchange(put_head("wide", MAX_VALUE + 4) + "val=" + &"v".repeat(MAX_VALUE), 1);
        // More than the kernel takes; and a body that comes when all of it was read.
        exchange(get("wide").repeat(8) + &get("none") + &put_head("wide", 5) + "val=", 9);
        exchange("1".into(), 1);
    }
}
