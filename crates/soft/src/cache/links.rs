//! Links between blocks: making them, undoing those that depend on address translation, and making
//! those of an address space again.
use super::{BlockId, CodeCache, NONE};
use crate::cpu::CELLS;
use crate::emit::EdgeKind;

/// A link that depends on the translation of another page than that of its origin.
#[derive(Clone, Copy)]
pub struct FarLink {
    edge: u32,
    target: BlockId,
}

impl CodeCache {
    /// Makes an edge jump straight to a block. If the code there has changed since the edge was
    /// made, and now wants flags that the edge does not keep, the edge's own block is thrown away
    /// instead, to be translated anew.
    pub fn link(&mut self, edge: u32, target: BlockId, global: bool, cells: &mut [u64; CELLS]) {
        let Some(&from) = self.edges.get(edge as usize) else { return };
        let (block, kind) = (from.block, from.kind);
        if self.block(target).is_some_and(|to| to.live_in() & !from.live() != 0) {
            self.kill(block, cells);
            return;
        }
        if !self.blocks.get(block as usize).is_some_and(|b| b.alive) {
            return;
        }
        let Some(to) = self.blocks.get(target as usize) else { return };
        // An instruction that crosses a page depends on the translation of the next one too.
        let crosses = to.second_page().is_some();
        match kind {
            EdgeKind::Always => return,
            // Versions are tried in one order, so that the search ends.
            EdgeKind::Stale(_) if target <= block || crosses => return,
            _ => {}
        }
        self.lead(edge, target, cells);
        if crosses || matches!(kind, EdgeKind::Far(_)) {
            let links = if global { &mut self.far_global } else { &mut self.far_local };
            links.push(FarLink { edge, target });
            if links.len() > 2 * self.edges.len() + 1024 {
                let edges = &self.edges;
                links.retain(|l| edges.get(l.edge as usize).is_some_and(|e| e.to == l.target));
                links.sort_unstable_by_key(|l| l.edge);
                links.dedup_by_key(|l| l.edge);
            }
        }
    }

    /// Takes an edge out of the list of the block it is linked to.
    pub(super) fn detach(&mut self, edge: u32) {
        let Some(e) = self.edges.get_mut(edge as usize) else { return };
        let (to, next, previous) = (e.to, e.next, e.previous);
        (e.to, e.next, e.previous) = (NONE, NONE, NONE);
        if let Some(e) = self.edges.get_mut(next as usize) {
            e.previous = previous;
        }
        if let Some(e) = self.edges.get_mut(previous as usize) {
            e.next = next;
        } else if let Some(block) = self.blocks.get_mut(to as usize) {
            block.incoming = next;
        }
    }

    /// Makes an edge leave to the run loop.
    pub(super) fn unlink(&mut self, edge: u32, cells: &mut [u64; CELLS]) {
        self.detach(edge);
        self.point(edge, self.edge_host(edge), cells);
    }

    /// Makes an edge lead to a block.
    fn lead(&mut self, edge: u32, target: BlockId, cells: &mut [u64; CELLS]) {
        self.detach(edge);
        let Some(entry) = self.entry(target) else { return };
        let Some(to) = self.blocks.get_mut(target as usize) else { return };
        let first = std::mem::replace(&mut to.incoming, edge);
        if let Some(e) = self.edges.get_mut(first as usize) {
            e.previous = edge;
        }
        if let Some(e) = self.edges.get_mut(edge as usize) {
            (e.to, e.next, e.previous) = (target, first, NONE);
        }
        self.point(edge, entry, cells);
    }

    fn point(&mut self, edge: u32, host: u64, cells: &mut [u64; CELLS]) {
        let Some(from) = self.edges.get(edge as usize) else { return };
        match from.kind {
            EdgeKind::Always => {}
            EdgeKind::Near(at) | EdgeKind::Stale(at) => {
                let Some(origin) = self.entry(from.block) else { return };
                self.memory.patch(origin + u64::from(at), host);
            }
            EdgeKind::Far(cell) => {
                if let Some(slot) = cells.get_mut(cell as usize) {
                    *slot = host;
                }
            }
        }
    }

    /// Hands out the links to pages that are not global, leaving `empty` to collect new ones.
    pub fn take_local_links(&mut self, mut empty: Vec<FarLink>) -> Vec<FarLink> {
        empty.clear();
        std::mem::replace(&mut self.far_local, empty)
    }

    /// Undoes links.
    pub fn unmake(&mut self, links: &[FarLink], cells: &mut [u64; CELLS]) {
        for link in links {
            self.unlink(link.edge, cells);
        }
    }

    /// Undoes all links that depend on translations of other pages.
    pub fn unmake_all(&mut self, cells: &mut [u64; CELLS]) {
        let (global, local) = (&mut self.far_global, &mut self.far_local);
        for links in [std::mem::take(global), std::mem::take(local)] {
            self.unmake(&links, cells);
        }
    }

    /// Makes links again that were handed out since the cache was last cleared, as far as both
    /// their ends still live.
    pub fn make_again(&mut self, mut links: Vec<FarLink>, cells: &mut [u64; CELLS]) {
        links.retain(|&FarLink { edge, target }| {
            let from = self.edges.get(edge as usize).map(|e| e.block);
            let alive =
                from.is_some_and(|b| self.alive(b).is_some()) && self.alive(target).is_some();
            if alive {
                self.lead(edge, target, cells);
            }
            alive
        });
        self.far_local = links;
    }
}
