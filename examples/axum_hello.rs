//! An axum server that loses no request in an upgrade, on keep-alive connections neither.
//!
//! ```text
//! cargo run --example axum_hello -- v1                                              alone, on 127.0.0.1:8080
//! zddsup run --listen 127.0.0.1:8080 -- target/debug/examples/axum_hello v1         supervised
//! ```
//!
//! A generation that drains accepts nothing more, and answers each request that still comes on an open connection with
//! `Connection: close`: the client then connects anew, to the next generation. An idle connection is left open, as its
//! next request may be on its way; only when half of the drain time has passed is it closed. HTTP leaves that one gap
//! open: a request that crosses with the close is not answered, and the client must send it again (RFC 9112, 9.5).

use std::error::Error;
use std::pin::pin;
use std::process::ExitCode;
use std::time::Duration;

use axum::http::header::{HeaderValue, CONNECTION};
use axum::middleware::map_response;
use axum::response::Response;
use axum::routing::get;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use zddsup::service::Service;

/// How long idle connections live in a drain without a time limit.
const IDLE: Duration = Duration::from_secs(30);

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("axum_hello: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), Box<dyn Error>> {
    let service = Service::from_env()?;
    service.drain_at_sigterm()?;
    let listener: TcpListener = service.listener_or_bind("http", "127.0.0.1:8080")?;
    let app = app(&service);
    service.ready()?;

    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(connections.spawn(serve(stream, app.clone(), service.clone()))),
                Err(error) => {
                    eprintln!("cannot accept: {error}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(_) = connections.join_next() => {}
            _ = service.draining() => break,
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
    service.drained()?;
    Ok(())
}

fn app(service: &Service) -> Router {
    let version = std::env::args().nth(1).or_else(|| std::env::var("VERSION").ok()).unwrap_or_else(|| "v0".to_owned());
    let generation = service.generation().unwrap_or(0);
    let line = format!("version={version} pid={} generation={generation}\n", std::process::id());
    let service = service.clone();
    Router::new().route("/", get(|| async { line })).layer(map_response(move |mut response: Response| {
        if service.is_draining() {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        std::future::ready(response)
    }))
}

async fn serve(stream: TcpStream, app: Router, service: Service) {
    let _slower_then = stream.set_nodelay(true);
    let mut connection = pin!(http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(app)));
    let result = tokio::select! {
        // The connection first: what has arrived is read before anything is closed.
        biased;
        result = connection.as_mut() => result,
        () = idle_for_long(&service) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        eprintln!("connection failed: {error}");
    }
}

/// Half of the drain time has passed.
async fn idle_for_long(service: &Service) {
    let drain = service.draining().await;
    tokio::time::sleep(drain.time_left().map_or(IDLE, |left| left / 2)).await;
}
