//! Measures requests to an image, with the flags of `qemu-img bench`, to compare with it:
//! `cargo run --release -p disk --example bench_image -- -f qcow2 -c 100000 -d 32 -s 4096 -S 69632
//! [-w] [-n] [--threads 2] [--flush-interval 100] IMAGE`.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed measurement says nothing")]

use disk::format::{self, Backing, OpenOptions};
use disk::requests::{Operation, Queue, Request};
use disk::{FileOptions, Format};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Instant;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let text = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).cloned()
    };
    let number = |name: &str, default: u64| {
        text(name).map_or(default, |value| value.parse().expect("a number follows each flag"))
    };
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    let (count, depth, size) = (number("-c", 75_000), number("-d", 64), number("-s", 4096));
    let (step, threads) = (number("-S", size), number("--threads", 2));
    let flush_interval = number("--flush-interval", 0);
    let write = has("-w");
    let file = if write { FileOptions::write() } else { FileOptions::read() };
    let file = FileOptions { direct: has("-n"), ..file };
    let options = OpenOptions { file, backing: Backing::Follow };
    let path = arguments.last().expect("an image is named");
    let format: Format = text("-f").unwrap_or("raw".to_owned()).parse().expect("a known format");
    let disk = format::open(Path::new(path), Some(format), options).expect("the image opens");
    let end = disk.size() / size * size;
    let queue = Queue::start(Arc::from(disk), threads as usize).expect("threads start");
    let (sender, ended) = mpsc::channel();
    let start = Instant::now();
    let mut buffers: Vec<Vec<u8>> = (0..depth).map(|_| vec![0xa5; size as usize]).collect();
    let mut offset = 0;
    let mut under_way = 0;
    for index in 0..count {
        if under_way == depth {
            buffers.push(ended.recv().unwrap());
            under_way -= 1;
        }
        let buffer = buffers.pop().unwrap();
        let operation = if write {
            Operation::Write { offset, data: buffer }
        } else {
            Operation::Read { offset, buffer }
        };
        submit(&queue, &sender, operation);
        under_way += 1;
        offset = (offset + step) % end;
        if flush_interval > 0 && (index + 1) % flush_interval == 0 {
            while under_way > 0 {
                buffers.push(ended.recv().unwrap());
                under_way -= 1;
            }
            submit(&queue, &sender, Operation::Flush);
            ended.recv().unwrap();
        }
    }
    queue.drain();
    let seconds = start.elapsed().as_secs_f64();
    let per_second = count as f64 / seconds;
    let rate = per_second * size as f64 / 1e6;
    println!("{seconds:.3} s, {per_second:.0} requests/s, {rate:.0} MB/s");
}

fn submit(queue: &Queue, sender: &mpsc::Sender<Vec<u8>>, operation: Operation) {
    let sender = sender.clone();
    let done = Box::new(move |completion: disk::requests::Completion| {
        completion.result.expect("the request succeeds");
        let _ = sender.send(completion.buffer);
    });
    queue.submit(Request { operation, done });
}
