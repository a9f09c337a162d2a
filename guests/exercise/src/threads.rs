//! Threads: locks, condition variables, channels, atomics, and what memory ordering promises.

use crate::hash::{Generator, sha256};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex, RwLock, mpsc};
use std::thread;

const THREADS: u64 = 4;
const ROUNDS: u64 = 5_000;

pub fn exercise() {
    counters();
    queue();
    pipeline();
    phases();
    store_buffering();
    publication();
    sort();
    many();
}

/// The same sum under a mutex, a lock of readers and a writer, a spin lock and two atomics.
fn counters() {
    let (mutex, lock) = (Mutex::new(0), RwLock::new(0));
    let (added, exchanged) = (AtomicU64::new(0), AtomicU64::new(0));
    let (ticket, serving, spun) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (mutex, lock, added, exchanged) = (&mutex, &lock, &added, &exchanged);
            let (ticket, serving, spun) = (&ticket, &serving, &spun);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let value = round ^ thread;
                    *mutex.lock().unwrap() += value;
                    *lock.write().unwrap() += value;
                    assert!(*lock.read().unwrap() >= value);
                    added.fetch_add(value, Ordering::Relaxed);
                    let step = |old: u64| Some(old.wrapping_add(value * value));
                    exchanged.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step).unwrap();
                    if round % 50 == 0 {
                        let mine = ticket.fetch_add(1, Ordering::Relaxed);
                        while serving.load(Ordering::Acquire) != mine {
                            thread::yield_now();
                        }
                        spun.store(spun.load(Ordering::Relaxed) + value, Ordering::Relaxed);
                        serving.store(mine.wrapping_add(1), Ordering::Release);
                    }
                }
            });
        }
    });
    println!("threads: mutex {} lock {}", mutex.into_inner().unwrap(), lock.into_inner().unwrap());
    println!("threads: added {added:?} exchanged {exchanged:?} spun {spun:?}");
}

/// A queue of four places between three producers and three consumers.
fn queue() {
    struct Queue {
        items: Mutex<(VecDeque<u64>, usize)>,
        changed: Condvar,
    }
    let queue = Queue { items: Mutex::new((VecDeque::new(), 3)), changed: Condvar::new() };
    let sums = thread::scope(|scope| {
        for producer in 0..3 {
            let queue = &queue;
            scope.spawn(move || {
                for item in 0..700 {
                    let items = queue.items.lock().unwrap();
                    let mut items =
                        queue.changed.wait_while(items, |(items, _)| items.len() >= 4).unwrap();
                    items.0.push_back(producer * 1000 + item);
                    queue.changed.notify_all();
                }
                queue.items.lock().unwrap().1 -= 1;
                queue.changed.notify_all();
            });
        }
        let consume = || {
            let (mut sum, mut count) = (0, 0);
            loop {
                let items = queue.items.lock().unwrap();
                let wait = |(items, producers): &mut (VecDeque<_>, usize)| {
                    items.is_empty() && *producers > 0
                };
                let mut items = queue.changed.wait_while(items, wait).unwrap();
                let Some(item) = items.0.pop_front() else { return (sum, count) };
                queue.changed.notify_all();
                sum += item;
                count += 1;
            }
        };
        let consumers: Vec<_> = (0..3).map(|_| scope.spawn(consume)).collect();
        consumers.into_iter().map(|consumer| consumer.join().unwrap()).collect::<Vec<_>>()
    });
    let total = sums.iter().fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
    println!("threads: queue {total:?}");
}

/// Numbers through five threads in a row, each of which changes them.
fn pipeline() {
    let (first, mut last) = mpsc::sync_channel::<u64>(8);
    for stage in 0..5 {
        let (sender, receiver) = mpsc::sync_channel(8);
        let input = std::mem::replace(&mut last, receiver);
        thread::spawn(move || {
            for value in input {
                sender.send(value.wrapping_mul(31).wrapping_add(stage)).unwrap();
            }
        });
    }
    thread::spawn(move || (0..1000).for_each(|number| first.send(number).unwrap()));
    let text: String = last.iter().map(|value| format!("{value}\n")).collect();
    println!("threads: pipeline {}", sha256(text.as_bytes()));
}

/// Phases that no thread may begin before all have ended the one before.
fn phases() {
    let barrier = Barrier::new(THREADS as usize);
    let cells: Vec<AtomicU64> = (0..THREADS).map(AtomicU64::new).collect();
    thread::scope(|scope| {
        for thread in 0..THREADS as usize {
            let (barrier, cells) = (&barrier, &cells);
            scope.spawn(move || {
                for _ in 0..200 {
                    let left = cells[(thread + 3) % 4].load(Ordering::Relaxed);
                    let right = cells[(thread + 1) % 4].load(Ordering::Relaxed);
                    barrier.wait();
                    cells[thread].fetch_add(left.wrapping_mul(3) ^ right, Ordering::Relaxed);
                    barrier.wait();
                }
            });
        }
    });
    println!("threads: phases {cells:?}");
}

/// Two threads that both store, then both load, cannot both miss the other's store
/// (sequential consistency; Intel SDM 3A 9.2.3.9 with the locked instructions of 9.2.3.8).
fn store_buffering() {
    const TRIES: usize = 5_000;
    let flags: Vec<[AtomicU32; 2]> = (0..TRIES).map(|_| Default::default()).collect();
    let side = |mine: usize| {
        let flags = &flags;
        move || -> Vec<u32> {
            flags
                .iter()
                .map(|pair| {
                    pair[mine].store(1, Ordering::SeqCst);
                    pair[1 - mine].load(Ordering::SeqCst)
                })
                .collect()
        }
    };
    let missed = thread::scope(|scope| {
        let (one, other) = (scope.spawn(side(0)), scope.spawn(side(1)));
        let (one, other) = (one.join().unwrap(), other.join().unwrap());
        one.into_iter().zip(other).filter(|pair| *pair == (0, 0)).count()
    });
    println!("threads: both missed {missed} times");
}

/// What is written before a release is there after the acquire that sees it.
fn publication() {
    let (data, turn) = (AtomicU64::new(0), AtomicUsize::new(0));
    let side = |mine: usize| {
        let (data, turn) = (&data, &turn);
        move || {
            for _ in 0..1000 {
                while turn.load(Ordering::Acquire) % 2 != mine {
                    thread::yield_now();
                }
                // Not atomic as a whole: only the turn protects it.
                let value = data.load(Ordering::Relaxed);
                let next = value * 5 + 1 + mine as u64;
                data.store(next & 0xffff_ffff, Ordering::Relaxed);
                turn.fetch_add(1, Ordering::Release);
            }
        }
    };
    thread::scope(|scope| {
        scope.spawn(side(0));
        scope.spawn(side(1));
    });
    println!("threads: turns {turn:?} data {data:?}");
}

/// A merge sort whose halves are threads, three levels deep.
fn sort() {
    fn sorted(data: &[u64], depth: u32) -> Vec<u64> {
        if depth == 0 {
            let mut data = data.to_vec();
            data.sort_unstable();
            return data;
        }
        let (left, right) = data.split_at(data.len() / 2);
        let (left, right) = thread::scope(|scope| {
            let left = scope.spawn(move || sorted(left, depth - 1));
            (sorted(right, depth - 1), left.join().unwrap())
        });
        let (mut left, mut right) = (left.into_iter().peekable(), right.into_iter().peekable());
        std::iter::from_fn(|| match (left.peek(), right.peek()) {
            (Some(one), Some(other)) if one > other => right.next(),
            (Some(_), _) => left.next(),
            _ => right.next(),
        })
        .collect()
    }
    let mut random = Generator(3);
    let data: Vec<u64> = (0..30_000).map(|_| random.next()).collect();
    let sorted = sorted(&data, 3);
    assert!(sorted.is_sorted() && sorted.len() == data.len());
    let bytes: Vec<u8> = sorted.into_iter().flat_map(u64::to_le_bytes).collect();
    println!("threads: sorted {}", sha256(&bytes));
}

/// Many short threads, each with its own stack and thread-local storage.
fn many() {
    thread_local!(static OWN: std::cell::Cell<u64> = const { std::cell::Cell::new(7) });
    let total = Arc::new(AtomicU64::new(0));
    for batch in 0..10 {
        let spawn = |number: u64| {
            let total = Arc::clone(&total);
            thread::spawn(move || {
                OWN.set(OWN.get() + number);
                thread::yield_now();
                total.fetch_add(OWN.get(), Ordering::Relaxed);
            })
        };
        let threads: Vec<_> = (0..10).map(|number| spawn(batch * 10 + number)).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
    println!("threads: many {total:?} here {}", OWN.get());
}
