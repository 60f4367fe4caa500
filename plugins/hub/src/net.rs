//! HTTP requests: trusted certificates, redirections, and which hosts receive the token.

use std::env;
use std::path::PathBuf;

use anyhow::{Result, bail};
use dictlearn_core::error::InputError;
use ureq::http::Response;
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use crate::trouble::{self, Failure};
use crate::{CONNECT, Client, LONG, PUBLIC, SILENCE};

/// Variables that name trusted certificates, in order of precedence: OpenSSL's, those of Python's requests, curl's.
const CERTIFICATES: [&str; 4] = ["SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"];
/// Maximum number of redirections to follow.
const REDIRECTIONS: usize = 10;

/// Returns the name and value of the first of these environment variables that is set and not empty.
pub fn variable<'a>(names: &[&'a str]) -> Option<(&'a str, String)> {
    let set = names.iter().filter_map(|name| Some((*name, env::var(name).ok()?)));
    set.into_iter().find(|(_, value)| !value.trim().is_empty())
}

/// Expands `~`, `$NAME` and `${NAME}` in a path from the environment, as Hugging Face's library does.
pub fn expanded(path: &str) -> PathBuf {
    let (mut out, mut rest) = (String::new(), path);
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let braced = after.strip_prefix('{').and_then(|after| after.split_once('}'));
        let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
        let (name, after_name) = braced.unwrap_or(after.split_at(end));
        rest = match env::var(name) {
            Ok(value) => {
                out.push_str(&value);
                after_name
            }
            Err(_) => {
                out.push('$');
                after
            }
        };
    }
    out.push_str(rest);
    match (out.strip_prefix('~'), env::home_dir()) {
        (Some(""), Some(home)) => home,
        (Some(below), Some(home)) if below.starts_with('/') => home.join(below.trim_start_matches('/')),
        _ => PathBuf::from(out),
    }
}

/// Makes the agent that sends all requests. It follows no redirections: these could lose a body or leak the token.
pub fn agent() -> Result<Agent> {
    let agent = Agent::config_builder()
        .tls_config(TlsConfig::builder().root_certs(trusted()?).build())
        .user_agent(concat!("dictlearn/", env!("CARGO_PKG_VERSION")))
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        .timeout_connect(Some(CONNECT))
        .timeout_per_read(Some(LONG))
        .timeout_per_write(Some(SILENCE))
        .build();
    Ok(agent.into())
}

/// Returns the certificates to trust: those named by the environment, else the system's, else Mozilla's.
fn trusted() -> Result<RootCerts> {
    let named = variable(&CERTIFICATES);
    let found = match &named {
        Some((_, path)) => {
            let path = expanded(path);
            let (file, folder) = if path.is_dir() { (None, Some(&*path)) } else { (Some(&*path), None) };
            rustls_native_certs::load_certs_from_paths(file, folder)
        }
        None => rustls_native_certs::load_native_certs(),
    };
    let certificates = found.certs.iter().map(|certificate| Certificate::from_der(certificate).to_owned());
    match named {
        Some((name, path)) if found.certs.is_empty() => {
            let why = found.errors.first().map_or("it has no certificates".to_owned(), ToString::to_string);
            bail!(
                InputError::new(format!("{name} is `{path}`: {why}"))
                    .help("set it to a file of PEM certificates (-----BEGIN CERTIFICATE-----), or unset it")
            )
        }
        None if found.certs.is_empty() => Ok(RootCerts::WebPki),
        _ => Ok(RootCerts::from(certificates)),
    }
}

/// Returns the help for a server whose certificate is not trusted.
pub fn certificate_help() -> String {
    match variable(&CERTIFICATES) {
        Some((name, path)) => {
            format!("add the certificate of the signing authority to {path}, set by {name}")
        }
        None => "if your network inspects TLS, set SSL_CERT_FILE to a file with its authority's certificate".to_owned(),
    }
}

/// Returns scheme, host and port of a URL.
fn origin(url: &str) -> Option<&str> {
    let (scheme, rest) = url.split_once("://")?;
    let host = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    (["http", "https"].contains(&scheme) && host > 0).then(|| &url[..scheme.len() + 3 + host])
}

/// Returns the URL that a redirection from `base` leads to; `None` if it is not http or https.
fn joined(base: &str, location: &str) -> Option<String> {
    let own = origin(base)?;
    let location = location.split('#').next().unwrap_or_default();
    let path = &base[own.len()..base.find(['?', '#']).unwrap_or(base.len())];
    let url = if location.starts_with("//") {
        format!("{}{location}", &own[..own.find("//")?])
    } else if location.contains("://") {
        location.to_owned()
    } else if location.starts_with('/') {
        format!("{own}{location}")
    } else {
        format!("{own}{}/{location}", path.rsplit_once('/').map_or("", |(folder, _)| folder))
    };
    origin(&url).is_some().then_some(url)
}

impl Client {
    /// Sends a GET request for the bytes from `from` on.
    pub(crate) fn get(&self, url: &str, from: u64) -> Result<Response<Body>, Failure> {
        let range = (from > 0).then(|| format!("bytes={from}-"));
        Failure::check(self.follow(url, range.as_deref(), |_| false)?)
    }

    /// Sends a GET request, and follows redirections up to the first response that is `enough`. The token is sent only
    /// to the endpoint, and to the Hub's own address, to which mirrors redirect.
    pub(crate) fn follow(
        &self,
        url: &str,
        range: Option<&str>,
        enough: impl Fn(&Response<Body>) -> bool,
    ) -> Result<Response<Body>, Failure> {
        let mut url = url.to_owned();
        for _ in 0..=REDIRECTIONS {
            let mut request = self.agent.get(&url);
            if let Some(range) = range {
                request = request.header("Range", range);
            }
            let own = [origin(&self.endpoint), Some(PUBLIC)].contains(&origin(&url));
            if let Some(token) = self.token.as_ref().filter(|_| own) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let request = request.config().timeout_recv_response(Some(SILENCE)).timeout_per_read(Some(SILENCE)).build();
            let response = request.call()?;
            trouble::reached();
            if !response.status().is_redirection() || enough(&response) {
                return Ok(response);
            }
            let location = response.headers().get("location").and_then(|to| to.to_str().ok());
            let next = location.and_then(|location| joined(&url, location));
            url = next.ok_or_else(|| {
                let to = location.map_or_else(|| "nowhere".to_owned(), |location| format!("`{location}`"));
                Failure::lasting(format!("{url} redirects to {to}"))
            })?;
        }
        Err(Failure::lasting(format!("more than {REDIRECTIONS} redirections, the last to {url}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirections_resolve_to_http_urls_only() {
        let base = "https://mirror:8443/hub/a/resolve/x?y=1";
        for (location, url) in [
            ("https://cdn.example/b?c=d#e", "https://cdn.example/b?c=d"),
            ("//cdn.example/b", "https://cdn.example/b"),
            ("/b/c", "https://mirror:8443/b/c"),
            ("z", "https://mirror:8443/hub/a/resolve/z"),
        ] {
            assert_eq!(joined(base, location).as_deref(), Some(url));
        }
        for nowhere in ["file:///etc/passwd", "https://", "ftp://a/b"] {
            assert_eq!(joined(base, nowhere), None, "{nowhere}");
        }
        assert_eq!(joined("http://host", "a").as_deref(), Some("http://host/a"));
    }

    #[test]
    fn home_and_variables_in_paths_are_expanded() {
        let home = env::home_dir().unwrap();
        assert_eq!(expanded("~"), home);
        assert_eq!(expanded("~/hf"), home.join("hf"));
        assert_eq!(expanded("$HOME/hf"), home.join("hf"));
        assert_eq!(expanded("${HOME}x/hf"), PathBuf::from(format!("{}x/hf", home.display())));
        for as_it_is in ["/a/~/b", "~somebody/hf", "$NO_SUCH_VARIABLE/hf", "${open", "a$"] {
            assert_eq!(expanded(as_it_is), PathBuf::from(as_it_is));
        }
    }
}
