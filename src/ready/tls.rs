//! TLS of probes: whom they trust.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::{ring, CryptoProvider};
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::{
    self, ClientConfig, ConfigBuilder, DigitallySignedStruct, RootCertStore, SignatureScheme, WantsVerifier,
};
use tokio_rustls::TlsConnector;

/// What a probe needs to speak TLS.
#[derive(Clone)]
pub struct Tls(TlsConnector);

/// Why TLS cannot be spoken.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file of `--ready-ca`.
    #[error("--ready-ca: cannot read certificates from {path:?}: {source}; it has to be in PEM")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: pem::Error,
    },
    /// The same, without anything to trust.
    #[error("--ready-ca: no certificate that could be trusted is in {0:?}; it has to be in PEM")]
    Empty(PathBuf),
    /// No roots.
    #[error(
        "this system has no certificates of authorities, by which --ready https:// could know its server: name a file \
         with --ready-ca, or write https+insecure://"
    )]
    NoRoots,
    /// The library's own.
    #[error("cannot set up TLS: {0}")]
    Library(#[from] rustls::Error),
}

impl Tls {
    /// Trusts these authorities, or the system's.
    pub fn verified(authorities: Option<&Path>) -> Result<Tls, TlsError> {
        let mut roots = RootCertStore::empty();
        if let Some(path) = authorities {
            let read = |source| TlsError::Read { path: path.to_owned(), source };
            let found =
                CertificateDer::pem_file_iter(path).map_err(read)?.collect::<Result<Vec<_>, _>>().map_err(read)?;
            roots.add_parsable_certificates(found);
            if roots.is_empty() {
                return Err(TlsError::Empty(path.to_owned()));
            }
        } else {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err(TlsError::NoRoots);
            }
        }
        Ok(Tls::of(builder()?.with_root_certificates(roots).with_no_client_auth()))
    }

    /// Trusts everybody.
    pub fn insecure() -> Result<Tls, TlsError> {
        let verifier = Arc::new(Anyone(Arc::new(ring::default_provider())));
        Ok(Tls::of(builder()?.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth()))
    }

    fn of(mut config: ClientConfig) -> Tls {
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Tls(TlsConnector::from(Arc::new(config)))
    }

    /// Shakes hands with a server, which is to be known by this name.
    pub async fn over(&self, stream: TcpStream, name: &str) -> io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
        self.0.connect(name, stream).await
    }
}

fn builder() -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, rustls::Error> {
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider())).with_safe_default_protocol_versions()
}

/// Any certificate will do.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{SocketAddr, TcpListener};
    use tokio_rustls::rustls::pki_types::PrivateKeyDer;
    use tokio_rustls::rustls::ServerConfig;
    use tokio_rustls::TlsAcceptor;

    /// A certificate for this name, in PEM, and a server that shakes hands once.
    fn server(name: &str) -> (String, SocketAddr) {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
        let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
        let config = builder.with_single_cert(vec![made.cert.der().clone()], key).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let _refused_perhaps = TlsAcceptor::from(Arc::new(config)).accept(stream).await;
        });
        (made.cert.pem(), address)
    }

    /// Shakes hands with a server of this name.
    async fn shake(tls: impl FnOnce(&str) -> Tls, name: &str, called: &str) -> io::Result<()> {
        let (pem, address) = server(name);
        let stream = TcpStream::connect(address).await.unwrap();
        tls(&pem).over(stream, called).await.map(drop)
    }

    fn trusting(pem: &str) -> Tls {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        std::fs::write(&path, pem).unwrap();
        Tls::verified(Some(&path)).unwrap()
    }

    fn stranger(_: &str) -> Tls {
        trusting(&rcgen::generate_simple_self_signed(["web".to_owned()]).unwrap().cert.pem())
    }

    #[tokio::test(flavor = "current_thread")]
    async fn who_is_trusted() {
        shake(trusting, "127.0.0.1", "127.0.0.1").await.unwrap();
        shake(trusting, "web.example", "web.example").await.unwrap();
        for (tls, called) in [(trusting as fn(&str) -> Tls, "other.example"), (stranger, "web")] {
            let error = shake(tls, "web", called).await.unwrap_err().to_string();
            assert!(error.contains("certificate"), "{error}");
        }
        shake(|_| Tls::insecure().unwrap(), "web", "127.0.0.1").await.unwrap();
    }

    #[test]
    fn a_file_without_certificates_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        let refused = || Tls::verified(Some(&path)).err().unwrap();
        assert!(matches!(refused(), TlsError::Read { .. }));
        std::fs::write(&path, "nothing").unwrap();
        assert!(matches!(refused(), TlsError::Empty(_)));
    }
}
