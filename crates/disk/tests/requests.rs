//! Queues of asynchronous requests.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use disk::format;
use disk::requests::{Completion, Operation, Queue, Request};
use disk::{DiskError, Format};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use support::{Random, folder};

const SIZE: u64 = 8 << 20;

fn queue(folder: &std::path::Path, threads: usize) -> Queue {
    let disk = format::create(&folder.join("image.qcow2"), Format::Qcow2, SIZE).unwrap();
    Queue::start(Arc::from(disk), threads).unwrap()
}

/// Submits one request and waits for it.
fn perform(queue: &Queue, operation: Operation) -> Completion {
    let (sender, receiver) = mpsc::channel();
    let done = Box::new(move |completion| sender.send(completion).unwrap());
    queue.submit(Request { operation, done });
    receiver.recv().unwrap()
}

#[test]
fn each_request_ends_once_with_its_buffer() {
    let folder = folder();
    let queue = queue(folder.path(), 2);
    let data = Random(1).bytes(100_000);
    let written = perform(&queue, Operation::Write { offset: 5000, data: data.clone() });
    written.result.unwrap();
    assert!(written.buffer == data);
    perform(&queue, Operation::WriteZeroes { offset: 0, length: 10_000 }).result.unwrap();
    perform(&queue, Operation::Flush).result.unwrap();
    let read = perform(&queue, Operation::Read { offset: 0, buffer: vec![9; 105_000] });
    read.result.unwrap();
    assert!(read.buffer[..10_000].iter().all(|byte| *byte == 0));
    assert!(read.buffer[10_000..] == data[5000..]);
    perform(&queue, Operation::Discard { offset: 0, length: SIZE }).result.unwrap();
    let beyond = perform(&queue, Operation::Read { offset: SIZE - 512, buffer: vec![0; 1024] });
    assert!(matches!(beyond.result, Err(DiskError::OutOfRange { .. })));
    assert_eq!(beyond.buffer.len(), 1024);
    let endless = perform(&queue, Operation::Discard { offset: u64::MAX, length: u64::MAX });
    assert!(matches!(endless.result, Err(DiskError::OutOfRange { .. })));
}

#[test]
fn draining_and_dropping_wait_for_everything() {
    let folder = folder();
    let queue = queue(folder.path(), 4);
    let ended = Arc::new(AtomicU64::new(0));
    let submit = |count: u64| {
        for index in 0..count {
            let ended = ended.clone();
            let done = Box::new(move |completion: Completion| {
                completion.result.unwrap();
                ended.fetch_add(1, Ordering::SeqCst);
            });
            let operation =
                Operation::Write { offset: index * 4096, data: vec![index as u8; 4096] };
            queue.submit(Request { operation, done });
        }
    };
    submit(1000);
    queue.drain();
    assert_eq!(ended.load(Ordering::SeqCst), 1000);
    queue.drain();
    submit(500);
    let disk = queue.disk().clone();
    drop(queue);
    assert_eq!(ended.load(Ordering::SeqCst), 1500);
    let mut read = [0; 4096];
    disk.read_at(77 * 4096, &mut read).unwrap();
    assert_eq!(read, [77; 4096]);
}
