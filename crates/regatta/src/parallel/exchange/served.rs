//! Workers push gradients to parameter servers, which update their shards, and get the parameters back. See
//! [`servers`](crate::servers) for the other side.

use super::{CommTime, GradientExchange, NamedState, StateOf, Whose};
use crate::autograd::waiting;
use crate::error::{Error, Result};
use crate::parallel::carried::{Carried, Purpose};
use crate::params::{ParamStore, Units};
use crate::servers::{Commit, Courier, Kind, ServerLink};
use regatta_comm::{Buffer, Group, Volume};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// See the [module](self).
pub struct ServedExchange {
    link: ServerLink,
    courier: Courier,
    units: Arc<Units>,
    /// By unit and server: the elements that the server keeps.
    parts: Vec<Vec<Range<usize>>>,
    /// Workers train each at its own speed.
    is_free: bool,
    step: u64,
    /// By unit: how often the servers have been asked for its parameters, and how often they were waited for.
    asked: Vec<(u64, u64)>,
    /// The sum of squares of this step's gradients: of their mean, or of this worker's where it waits for nobody.
    squares: f64,
    /// The first worker whose gradients are not finite.
    not_finite: Option<usize>,
    steps_done: u64,
    saves: u64,
    /// Pushes of all workers that the servers have applied, and whether this worker shall end.
    progress: Option<(u64, bool)>,
    /// By kind and unit: the moments of a checkpoint that is being read or written.
    moments: Option<[Vec<Vec<f32>>; 2]>,
    updates: Option<u64>,
    carried: Carried,
    time: CommTime,
}

impl ServedExchange {
    /// An exchange for `units` by way of `link`. `moments` says which kinds the servers' optimizer has.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn new(link: ServerLink, units: Arc<Units>, moments: usize) -> Result<Self> {
        let (count, servers) = (units.units.len(), link.servers.count);
        let sharded = units.sharded_over(servers);
        let parts: Vec<Vec<Range<usize>>> = (0..count)
            .map(|unit| (0..servers).map(|server| sharded.within(unit, server)).collect())
            .collect();
        let zeros = |wanted: bool| -> Vec<Vec<f32>> {
            if wanted { units.units.iter().map(|unit| vec![0.0; unit.len]).collect() } else { vec![] }
        };
        // The first worker hands the numbers of a checkpoint to the servers.
        let moments = (link.worker() == 0).then(|| [zeros(moments > 0), zeros(moments > 1)]);
        Ok(Self {
            courier: Courier::start(link.clone(), parts.clone())?,
            is_free: link.servers.is_free(),
            link,
            units,
            parts,
            step: 0,
            asked: vec![(0, 0); count],
            squares: 0.0,
            not_finite: None,
            steps_done: 0,
            saves: 0,
            progress: None,
            moments,
            updates: None,
            carried: Carried::default(),
            time: CommTime::default(),
        })
    }

    fn servers(&self) -> usize {
        self.link.servers.count
    }

    /// Sends a server its part of a unit, before the first step.
    fn hand_over(&self, kind: Kind, unit: usize, numbers: &[f32]) -> Result<()> {
        let wire = self.link.wire();
        for (server, part) in self.parts[unit].iter().enumerate() {
            let to = wire.place(self.link.rank_of(server))?;
            wire.requests().send(&numbers[part.clone()], to, kind.tag(unit))?;
        }
        Ok(())
    }

    /// Does `work`, and again after the death of a worker that the others can do without.
    fn surviving<R>(&mut self, mut work: impl FnMut(&mut Self) -> Result<R>) -> Result<R> {
        loop {
            match work(self) {
                Err(error) if self.is_free => self.go_on_after(error)?,
                outcome => return outcome,
            }
        }
    }

    /// Goes on without a worker that has died: what this one has pushed and the servers have not applied is lost, and the
    /// parameters are fetched anew.
    fn go_on_after(&mut self, error: Error) -> Result<()> {
        self.link.go_on_after(error)?;
        self.courier = Courier::start(self.link.clone(), self.parts.clone())?;
        (self.steps_done, self.saves) = (0, 0);
        self.asked.fill((1, 0));
        // If another one dies meanwhile, the next wait shows it.
        let _ = self.courier.tell(self.step, Kind::Pull, &[]);
        Ok(())
    }

    /// Waits for the newest parameters of a unit.
    fn fetch(&mut self, unit: usize, store: &mut ParamStore) -> Result<()> {
        self.surviving(|exchange| exchange.fetch_once(unit, store))
    }

    fn fetch_once(&mut self, unit: usize, store: &mut ParamStore) -> Result<()> {
        let (asked, fetched) = self.asked[unit];
        if asked == fetched {
            return Ok(());
        }
        let begun = Instant::now();
        let (courier, parts) = (&self.courier, &self.parts[unit]);
        waiting("wait for the servers", || -> Result<()> {
            for (server, part) in parts.iter().enumerate() {
                if let Some(message) = courier.wait(Kind::Parameters, unit, server, asked)? {
                    store.own_mut(unit)[part.clone()].copy_from_slice(message.numbers()?);
                }
            }
            Ok(())
        })?;
        self.asked[unit].1 = asked;
        self.time.add_exposed(begun.elapsed());
        Ok(())
    }

    /// Makes the servers apply what was pushed, or forget it.
    fn commit(&mut self, applies: bool, lr: f64, scale: f64) -> Result<()> {
        if !applies {
            return self.courier.tell(self.step, Kind::Discard, &[]);
        }
        self.courier.tell(self.step, Kind::Commit, &Commit { lr, scale }.to_numbers())?;
        for unit in 0..self.asked.len() {
            self.asked[unit].0 += 1;
            self.count(Purpose::Parameters, unit);
        }
        if !self.is_free {
            return Ok(());
        }
        self.steps_done += 1;
        let begun = Instant::now();
        let message = self.courier.wait(Kind::Progress, 0, 0, self.steps_done)?;
        if let Some([applied, ends]) = message.as_ref().map(|message| message.numbers::<f64>()).transpose()? {
            self.progress = Some((*applied as u64, *ends > 0.0));
        }
        self.time.add_exposed(begun.elapsed());
        Ok(())
    }

    /// Gets all of the servers' numbers, as they are at one moment.
    fn ask_for_all(&mut self, store: &mut ParamStore) -> Result<()> {
        (0..self.asked.len()).try_for_each(|unit| self.fetch_once(unit, store))?;
        if self.link.worker() > 0 {
            return Ok(());
        }
        self.courier.tell(self.step, Kind::Save, &[])?;
        self.saves += 1;
        self.asked.iter_mut().for_each(|(asked, _)| *asked += 1);
        (0..self.asked.len()).try_for_each(|unit| self.fetch_once(unit, store))?;
        let mut moments = [vec![], vec![]];
        for server in 0..self.servers() {
            let Some(message) = self.courier.wait(Kind::Save, 0, server, self.saves)? else { continue };
            self.updates = message.numbers::<f64>()?.first().map(|updates| *updates as u64);
            // The moments came before it.
            for (kind, numbers) in [Kind::First, Kind::Second].into_iter().zip(&mut moments) {
                for (unit, parts) in self.parts.iter().enumerate() {
                    let Some(message) = self.courier.wait(kind, unit, server, 0)? else { continue };
                    if numbers.is_empty() {
                        *numbers = self.units.units.iter().map(|unit| vec![0.0; unit.len]).collect();
                    }
                    numbers[unit][parts[server].clone()].copy_from_slice(message.numbers()?);
                }
            }
        }
        self.moments = Some(moments);
        Ok(())
    }

    /// Counts what goes between this worker and the servers for a unit.
    fn count(&mut self, purpose: Purpose, unit: usize) {
        let bytes = (self.units.units[unit].len * size_of::<f32>()) as u64;
        let sent = if purpose == Purpose::Gradients { bytes } else { 0 };
        self.carried.add(purpose, regatta_comm::Kind::Send, Volume { operations: 1, bytes, sent });
    }
}

impl GradientExchange for ServedExchange {
    fn begin(&mut self, step: u64) {
        self.step = step;
        (self.squares, self.not_finite) = (0.0, None);
        self.moments = None;
    }

    fn buffer(&mut self, unit: usize) -> Result<Buffer<f32>> {
        match self.courier.returned(unit) {
            Some(buffer) => Ok(buffer),
            None => Ok(Group::solo().buffer(self.units.units[unit].len)?),
        }
    }

    fn push(&mut self, unit: usize, gradients: Buffer<f32>) -> Result<()> {
        if self.is_free {
            self.squares += self.units.squares(unit, 0..gradients.len(), &gradients);
        }
        self.count(Purpose::Gradients, unit);
        match self.courier.push(self.step, unit, gradients) {
            // The end of the step shows whether the others can do without whoever has died.
            Err(_) if self.is_free => Ok(()),
            outcome => outcome,
        }
    }

    fn finish(&mut self) -> Result<()> {
        if self.is_free {
            return Ok(());
        }
        self.steps_done += 1;
        let (begun, steps) = (Instant::now(), self.steps_done);
        for server in 0..self.servers() {
            let message = self.courier.wait(Kind::Squares, 0, server, steps)?;
            if let Some([squares, culprit]) =
                message.as_ref().map(|message| message.numbers::<f64>()).transpose()?
            {
                self.squares += squares;
                let culprit = (*culprit >= 0.0).then_some(*culprit as usize);
                self.not_finite = [self.not_finite, culprit].into_iter().flatten().min();
            }
        }
        self.time.add_exposed(begun.elapsed());
        Ok(())
    }

    fn combined(&mut self, _: usize) -> Option<&mut [f32]> {
        None
    }

    fn squares(&self) -> Option<f64> {
        Some(self.squares)
    }

    fn not_finite(&self) -> Option<usize> {
        self.not_finite
    }

    fn update_elsewhere(&mut self, applies: bool, lr: f64, scale: f64) -> Result<()> {
        match self.commit(applies, lr, scale) {
            // What this worker has pushed in the step may be lost, and the next one is begun.
            Err(error) if self.is_free => self.go_on_after(error),
            outcome => outcome,
        }
    }

    fn progress(&self) -> Option<(u64, bool)> {
        self.progress
    }

    fn acquire(&mut self, unit: usize, store: &mut ParamStore) -> Result<()> {
        self.fetch(unit, store)
    }

    fn wait_all(&mut self, store: &mut ParamStore) -> Result<()> {
        (0..self.asked.len()).try_for_each(|unit| self.fetch(unit, store))
    }

    fn ready(&mut self, store: &mut ParamStore, updates: u64) -> Result<()> {
        let moments = self.moments.take();
        if self.link.worker() > 0 {
            self.asked.iter_mut().for_each(|(asked, _)| *asked += 1);
            return self.wait_all(store);
        }
        for unit in 0..self.asked.len() {
            self.hand_over(Kind::Parameters, unit, store.own(unit))?;
            for (kind, numbers) in [Kind::First, Kind::Second].into_iter().zip(moments.iter().flatten()) {
                // Without a checkpoint they are zeros, as the servers' own.
                if updates > 0
                    && let Some(numbers) = numbers.get(unit)
                {
                    self.hand_over(kind, unit, numbers)?;
                }
            }
        }
        self.courier.tell(self.step, Kind::Begin, &[updates as f64])?;
        self.courier.flush()
    }

    fn before_save(&mut self, store: &mut ParamStore) -> Result<()> {
        self.surviving(|exchange| exchange.ask_for_all(store))
    }

    fn updates(&self) -> Option<u64> {
        self.updates
    }

    fn state(&mut self) -> NamedState<'_> {
        let kinds = ["first", "second"].into_iter().zip(self.moments.iter_mut().flatten());
        let kept = kinds.filter(|(_, numbers)| !numbers.is_empty());
        kept.map(|(name, numbers)| StateOf {
            name,
            whose: Whose::All,
            units: numbers.iter_mut().map(Vec::as_mut_slice).collect(),
        })
        .collect()
    }

    fn leave(&mut self, ends: bool) -> Result<()> {
        self.surviving(|exchange| {
            exchange.courier.tell(u64::MAX, Kind::Leave, &[f64::from(u8::from(ends))])?;
            exchange.courier.flush()
        })
    }

    fn carried(&self) -> Carried {
        self.carried
    }

    fn take_time(&mut self) -> CommTime {
        let mut time = std::mem::take(&mut self.time);
        time.busy += self.courier.take_busy();
        time
    }

    fn bytes(&self) -> (usize, usize) {
        let all: usize = self.units.units.iter().map(|unit| unit.len * size_of::<f32>()).sum();
        // The gradients on their way, and the parameters that come back.
        (0, 2 * all)
    }
}

/// The error for a worker without servers.
pub(super) fn no_servers() -> Error {
    Error::Usage(
        "the plan has parameter servers, and this job has none: `regatta train --servers N` starts them"
            .into(),
    )
}
