//! An axum server that knows nothing of zddsup and binds for itself.
//!
//! ```text
//! cargo build --examples
//! zddsup run -- target/debug/examples/axum_plain 127.0.0.1:8080
//! ```

use axum::routing::get;
use axum::Router;
use tokio::net::TcpListener;

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    let app = Router::new().route("/", get(|| async { "axum\n" }));
    axum::serve(TcpListener::bind(address).await?, app).await
}
