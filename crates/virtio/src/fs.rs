//! The file system device (§5.11): a folder of the host, shared by the FUSE server of `share`.
use crate::chain::Chain;
use crate::worker::Worker;
use crate::{ActivateError, Activation, DeviceKind, Queue, VirtioDevice, pci, read_bytes};
use device::pci::PciSlot;
use device::state::Reader;
use device::{MachineBuilder, MapError, Notify, RestoreError, SavedState, Wire};
use share::{MAX_REPLY, MAX_REQUEST, Server};
use std::fmt;
use std::sync::Arc;

/// Queues (§5.11.2).
mod queue {
    /// FORGET and INTERRUPT, which overtake the others.
    pub const PRIORITY: u16 = 0;
    /// Everything else.
    pub const REQUESTS: u16 = 1;
}

/// Sizes of the queues. Linux makes requests as large as the queue has descriptors, one a page:
/// this is room for [`share::MAX_DATA`].
const SIZES: [u16; 2] = [128, 512];

/// Threads that serve requests: a slow one does not hold up the others.
const THREADS: usize = 4;

/// Bytes of the tag in the configuration space (§5.11.4).
const TAG: usize = 36;

/// The name by which a guest mounts a share: `mount -t virtiofs TAG FOLDER`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Tag([u8; TAG]);

/// A name that cannot be a tag.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} cannot name a share; give 1 to 36 bytes of text without zeroes")]
pub struct TagError(String);

impl Tag {
    /// Makes a tag of a name: 1 to 36 bytes, none of them zero.
    ///
    /// # Errors
    /// The name is empty, too long, or has a zero byte.
    pub fn new(name: &str) -> Result<Self, TagError> {
        let bytes = name.as_bytes();
        let mut tag = [0; TAG];
        match tag.get_mut(..bytes.len()) {
            Some(front) if !bytes.is_empty() && !bytes.contains(&0) => front.copy_from_slice(bytes),
            _ => return Err(TagError(name.to_owned())),
        }
        Ok(Self(tag))
    }
}

impl Tag {
    /// The tag of a machine's share by its number: `share0`, `share1`.
    pub fn numbered(number: usize) -> Self {
        let mut tag = [0; TAG];
        // At most 25 bytes.
        let name = format!("share{number}");
        tag.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
        Self(tag)
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        String::from_utf8_lossy(&self.0).trim_end_matches('\0').fmt(f)
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tag({self})")
    }
}

/// A file system device.
pub struct FileSystem {
    // Configuration.
    tag: Tag,
    // Connections, and the guest's session in the server.
    server: Arc<Server>,
    workers: Option<Worker>,
}

impl FileSystem {
    /// A device through which `server` is reached. A session from before ends.
    pub fn new(tag: Tag, server: Arc<Server>) -> Self {
        server.reset();
        Self { tag, server, workers: None }
    }

    /// The configuration space (§5.11.4): tag and number of request queues.
    fn config(&self) -> [u8; TAG + 4] {
        let mut space = [0; TAG + 4];
        let queues = 1u32.to_le_bytes();
        space.iter_mut().zip(self.tag.0.into_iter().chain(queues)).for_each(|(to, b)| *to = b);
        space
    }
}

impl VirtioDevice for FileSystem {
    fn kind(&self) -> DeviceKind {
        DeviceKind::FileSystem
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        SIZES.to_vec()
    }

    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn activate(
        &mut self,
        activation: Activation,
    ) -> Result<Vec<Option<Arc<dyn Notify>>>, ActivateError> {
        let mut queues = activation.queues.into_iter();
        let mut next = |number| queues.next().flatten().ok_or(ActivateError::Queue(number));
        let (priority, requests) = (next(queue::PRIORITY)?, next(queue::REQUESTS)?);
        let server = self.server.clone();
        let workers =
            Worker::spawn_pool("virtio-fs", THREADS, &activation.transport, move |others| {
                let mut buffers = Buffers::default();
                loop {
                    let first = buffers.serve_one(&server, &priority, others);
                    let second = buffers.serve_one(&server, &requests, others);
                    if !first && !second {
                        return;
                    }
                }
            })?;
        let notifier = workers.notifier();
        self.workers = Some(workers);
        Ok(vec![Some(notifier.clone()), Some(notifier)])
    }

    fn deactivate(&mut self) {
        self.workers = None;
    }

    fn reset(&mut self) {
        self.server.reset();
    }

    fn save(&self, state: &mut SavedState) {
        state.put("fs_session", &self.server.save());
    }

    fn restore(&mut self, state: &mut Reader<'_>) -> Result<(), RestoreError> {
        let session: Vec<u8> = state.get("fs_session")?;
        self.server.restore(&session).map_err(|_| state.out_of_range("fs_session"))
    }
}

/// A share that is plugged into a machine. A machine that starts again goes on with the same server.
#[derive(Clone)]
pub struct FsConfig {
    /// What the guest mounts it by.
    pub tag: Tag,
    /// The folder.
    pub server: Arc<Server>,
}

impl fmt::Debug for FsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FsConfig").field("tag", &self.tag).finish_non_exhaustive()
    }
}

impl Wire for FsConfig {
    type Handle = PciSlot;

    fn wire(self, machine: &mut dyn MachineBuilder) -> Result<PciSlot, MapError> {
        let name = format!("fs-{}", self.tag);
        pci::plug(machine, name, Box::new(FileSystem::new(self.tag, self.server)))
    }
}

/// A thread's copies of a request and its reply.
#[derive(Default)]
struct Buffers {
    request: Vec<u8>,
    reply: Vec<u8>,
}

impl Buffers {
    /// Serves the next request of a queue, if there is one. Notifications stay on all the while:
    /// the next request is for another thread.
    fn serve_one(&mut self, server: &Server, queue: &Queue, others: &dyn Notify) -> bool {
        let Some(chain) = queue.pop() else { return queue.want_notifications(true) };
        if queue.want_notifications(true) {
            others.notify();
        }
        let written = self.serve(server, &chain);
        queue.push(chain, written);
        true
    }

    fn serve(&mut self, server: &Server, chain: &Chain) -> u32 {
        let mut reader = chain.reader();
        // What is longer than any request is refused by the server, whose copy is cut off.
        self.request.resize(reader.remaining().min(MAX_REQUEST), 0);
        reader.read(&mut self.request);
        let mut writer = chain.writer();
        server.serve(&self.request, writer.remaining().min(MAX_REPLY), &mut self.reply);
        writer.write(&self.reply);
        writer.written()
    }
}

#[cfg(test)]
#[path = "fs_tests.rs"]
mod tests;
