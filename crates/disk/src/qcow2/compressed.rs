//! Compressed clusters: decompressing them, and keeping the latest few, because a guest reads a
//! cluster in several requests.
use super::Compression;
use crate::DiskError;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

/// Memory for decompressed clusters, in bytes.
const KEPT: usize = 4 << 20;

/// Largest window of a Zstandard frame, which the decoder takes from the frame: no cluster is
/// larger than 2 MiB, and no compressor chooses a window beyond four times that for it.
const ZSTD_WINDOW: u64 = 8 << 20;

/// Decompresses clusters.
#[derive(Debug)]
pub(crate) struct Decompressor {
    compression: Compression,
    cluster_size: usize,
    /// Clusters by the offset of their compressed data, the most recent last.
    latest: Mutex<Vec<(u64, Arc<[u8]>)>>,
}

impl Decompressor {
    pub fn new(compression: Compression, cluster_size: u64) -> Self {
        let cluster_size = usize::try_from(cluster_size).unwrap_or(0);
        Self { compression, cluster_size, latest: Mutex::default() }
    }

    /// The content of the cluster whose compressed data is at `host`; `load` reads that data, if it
    /// is needed.
    pub fn cluster(
        &self,
        host: u64,
        file: &dyn Fn() -> String,
        load: impl FnOnce() -> Result<Vec<u8>, DiskError>,
    ) -> Result<Arc<[u8]>, DiskError> {
        if let Some(known) = self.find(host) {
            return Ok(known);
        }
        let compressed = load()?;
        let cluster: Arc<[u8]> = self
            .decompress(&compressed)
            .ok_or_else(|| DiskError::Damaged {
                file: file(),
                what: format!("the compressed cluster at {host} cannot be decompressed"),
            })?
            .into();
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        let most = (KEPT / self.cluster_size.max(1)).max(1);
        if latest.len() >= most {
            latest.remove(0);
        }
        latest.push((host, cluster.clone()));
        Ok(cluster)
    }

    fn find(&self, host: u64) -> Option<Arc<[u8]>> {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        let index = latest.iter().position(|(known, _)| *known == host)?;
        let found = latest.remove(index);
        let cluster = found.1.clone();
        latest.push(found);
        Some(cluster)
    }

    /// Forgets everything: compressed data is about to be replaced by other data.
    pub fn forget(&self) {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// `None` where the data is not a whole cluster's.
    fn decompress(&self, compressed: &[u8]) -> Option<Vec<u8>> {
        let mut cluster = vec![0; self.cluster_size];
        match self.compression {
            Compression::Deflate => {
                flate2::read::DeflateDecoder::new(compressed).read_exact(&mut cluster).ok()?;
            }
            Compression::Zstd => {
                ruzstd::decoding::StreamingDecoder::new_with_max_window_size(
                    compressed,
                    ZSTD_WINDOW,
                )
                .ok()?
                .read_exact(&mut cluster)
                .ok()?;
            }
        }
        Some(cluster)
    }
}
