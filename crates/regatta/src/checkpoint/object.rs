//! Blocking access to object stores.

use crate::error::{Error, Result};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload, WriteMultipart};
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use tokio::runtime::{Builder, Handle, Runtime};

/// Bytes up to which an object is uploaded in one request.
const SINGLE_BYTES: u64 = 16 << 20;
/// Most parts of an upload; stores accept at most 10 000.
const MOST_PARTS: u64 = 9_000;
/// Parts that are uploaded at once.
const IN_FLIGHT: usize = 4;

/// The stores of `memory://NAME`, by name; they live as long as the process.
static MEMORY: LazyLock<Mutex<HashMap<String, Arc<InMemory>>>> = LazyLock::new(Mutex::default);

/// A prefix in an object store.
#[derive(Debug, Clone)]
pub(super) struct ObjectFolder {
    /// Scheme and bucket, for messages.
    root: String,
    prefix: Key,
    store: Arc<dyn ObjectStore>,
    runtime: Arc<Runtime>,
}

impl ObjectFolder {
    pub fn parse(url: &str) -> Result<Self> {
        let wrong = |problem: String| Error::checkpoint(url, problem);
        let (scheme, rest) = url.split_once("://").ok_or_else(|| wrong("is not a URL".into()))?;
        let (bucket, path) = rest.split_once('/').unwrap_or((rest, ""));
        let store = store(scheme, bucket, url).map_err(wrong)?;
        let prefix = Key::from_url_path(path).map_err(|error| wrong(error.to_string()))?;
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = Arc::new(runtime.map_err(Error::io("start a client for", url))?);
        Ok(Self { root: format!("{scheme}://{bucket}"), prefix, store, runtime })
    }

    pub fn show(&self, name: &str) -> String {
        let path = self.key(name).to_string();
        let slash = if path.is_empty() { "" } else { "/" };
        format!("{}{slash}{path}", self.root)
    }

    pub fn split(&self) -> Option<(Self, String)> {
        let mut parts: Vec<String> = self.prefix.parts().map(|part| part.as_ref().to_string()).collect();
        let name = parts.pop()?;
        Some((Self { prefix: Key::from_iter(parts), ..self.clone() }, name))
    }

    fn key(&self, name: &str) -> Key {
        name.split('/').filter(|part| !part.is_empty()).fold(self.prefix.clone(), |key, part| key.join(part))
    }

    fn wait<T: Send>(&self, work: impl Future<Output = object_store::Result<T>> + Send) -> io::Result<T> {
        let waited = if Handle::try_current().is_ok() {
            // A thread that runs async code must not block on a future, but another thread may.
            let panicked = || io::Error::other("the object store's client panicked");
            std::thread::scope(|scope| scope.spawn(|| self.runtime.block_on(work)).join())
                .map_err(|_| panicked())?
        } else {
            self.runtime.block_on(work)
        };
        waited.map_err(|error| match error {
            object_store::Error::NotFound { .. } => io::Error::new(io::ErrorKind::NotFound, error),
            other => io::Error::other(other),
        })
    }

    pub fn get(&self, name: &str) -> io::Result<Vec<u8>> {
        let key = self.key(name);
        self.wait(async { Ok(self.store.get(&key).await?.bytes().await?.to_vec()) })
    }

    pub fn put(&self, name: &str, bytes: Vec<u8>) -> io::Result<()> {
        let key = self.key(name);
        self.wait(async { self.store.put(&key, PutPayload::from(bytes)).await.map(drop) })
    }

    pub fn size(&self, name: &str) -> io::Result<u64> {
        let key = self.key(name);
        self.wait(async { Ok(self.store.head(&key).await?.size) })
    }

    pub fn remove(&self, name: &str) -> io::Result<()> {
        let key = self.key(name);
        self.wait(async { self.store.delete(&key).await })
    }

    pub fn folders(&self) -> io::Result<Vec<String>> {
        let listed = self.wait(self.store.list_with_delimiter(Some(&self.prefix)))?;
        Ok(listed.common_prefixes.iter().filter_map(|key| key.filename().map(str::to_string)).collect())
    }

    pub fn remove_folder(&self, name: &str, first: &str) -> io::Result<()> {
        let folder = self.key(name);
        let first = folder.clone().join(first);
        self.wait(async {
            let mut keys: Vec<Key> = self
                .store
                .list_with_delimiter(Some(&folder))
                .await?
                .objects
                .into_iter()
                .map(|object| object.location)
                .collect();
            keys.sort_by_key(|key| *key != first);
            for key in keys {
                match self.store.delete(&key).await {
                    Err(object_store::Error::NotFound { .. }) => {}
                    other => other?,
                }
            }
            Ok(())
        })
    }

    pub fn create(&self, name: &str, total: u64) -> io::Result<Upload> {
        let key = self.key(name);
        let state = if total <= SINGLE_BYTES {
            State::Single(Vec::with_capacity(total as usize))
        } else {
            let part = SINGLE_BYTES.max(total.div_ceil(MOST_PARTS)) as usize;
            let upload = self.wait(self.store.put_multipart(&key))?;
            State::Parts(WriteMultipart::new_with_chunk_size(upload, part))
        };
        Ok(Upload { folder: self.clone(), key, state })
    }

    pub fn open(&self, name: &str) -> io::Result<(Object, u64)> {
        let size = self.size(name)?;
        Ok((Object { folder: self.clone(), key: self.key(name) }, size))
    }
}

fn store(scheme: &str, bucket: &str, url: &str) -> Result<Arc<dyn ObjectStore>, String> {
    if bucket.is_empty() && !["file", "memory"].contains(&scheme) {
        return Err(format!("names no bucket: write {scheme}://BUCKET/PREFIX"));
    }
    match scheme {
        "file" if bucket.is_empty() => Ok(Arc::new(LocalFileSystem::new().with_fsync(true))),
        "file" => Err("names a host: write file:///FOLDER, with three slashes".into()),
        "memory" => {
            let mut stores = MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
            Ok(stores.entry(bucket.into()).or_default().clone())
        }
        "s3" | "s3a" => s3(url),
        "gs" => gcs(url),
        "az" | "abfs" | "abfss" | "azure" => azure(url),
        _ => Err(format!(
            "{scheme}:// is not supported as an object store: use s3://, gs://, az://, file:/// or memory://"
        )),
    }
}

/// Defines a function that creates a cloud store's client, or returns an error that names the missing feature.
macro_rules! cloud {
    ($name:ident, $feature:literal, $builder:path) => {
        #[cfg(feature = $feature)]
        fn $name(url: &str) -> Result<Arc<dyn ObjectStore>, String> {
            type Client = $builder;
            let client = Client::from_env().with_url(url).build();
            client.map(|client| Arc::new(client) as _).map_err(|error| error.to_string())
        }

        #[cfg(not(feature = $feature))]
        fn $name(_: &str) -> Result<Arc<dyn ObjectStore>, String> {
            let feature = $feature;
            Err(format!("this program was built without `{feature}`: build it with --features {feature}"))
        }
    };
}

cloud!(s3, "s3", object_store::aws::AmazonS3Builder);
cloud!(gcs, "gcs", object_store::gcp::GoogleCloudStorageBuilder);
cloud!(azure, "azure", object_store::azure::MicrosoftAzureBuilder);

/// An object that is being written. It exists in the store only after [`finish`](Self::finish).
pub(super) struct Upload {
    folder: ObjectFolder,
    key: Key,
    state: State,
}

enum State {
    Single(Vec<u8>),
    Parts(WriteMultipart),
    Finished,
}

impl Upload {
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.state {
            State::Single(held) => held.extend_from_slice(bytes),
            State::Parts(parts) => self.folder.wait(async {
                parts.wait_for_capacity(IN_FLIGHT).await?;
                parts.write(bytes);
                Ok(())
            })?,
            State::Finished => {}
        }
        Ok(())
    }

    pub fn finish(mut self) -> io::Result<()> {
        match std::mem::replace(&mut self.state, State::Finished) {
            State::Single(bytes) => {
                let put = self.folder.store.put(&self.key, PutPayload::from(bytes));
                self.folder.wait(async { put.await.map(drop) })
            }
            State::Parts(parts) => self.folder.wait(async { parts.finish().await.map(drop) }),
            State::Finished => Ok(()),
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let State::Parts(parts) = std::mem::replace(&mut self.state, State::Finished) {
            // The error that caused the abort matters more.
            let _ = self.folder.wait(parts.abort());
        }
    }
}

/// An object that is read in parts.
pub(super) struct Object {
    folder: ObjectFolder,
    key: Key,
}

impl Object {
    pub fn read_at(&self, offset: u64, target: &mut [u8]) -> io::Result<()> {
        let range = offset..offset + target.len() as u64;
        let bytes = self.folder.wait(async { self.folder.store.get_range(&self.key, range).await })?;
        if bytes.len() != target.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        target.copy_from_slice(&bytes);
        Ok(())
    }
}
