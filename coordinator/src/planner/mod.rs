//! The planner decides which worker runs which layers. It is a pure function from a [`Problem`] to a [`Plan`] or a [`Refusal`];
//! `README.md` in this folder states the optimisation problem.
//!
//! It knows sizes, speeds and pins. It does not know who is alive, how layers get loaded, or what time it is: the caller describes
//! the workers that it may use, and carries the answer out.
//!
//! `problem` has the question and the answer, `cost` prices one stage, `search` cuts the layers at the pins, `subsets` solves
//! exactly for up to [`EXACT_WORKERS_MAX`] workers, `ordered` approximately for more, `solve` puts them together.

mod cost;
mod ordered;
mod problem;
mod search;
mod shares;
mod solve;
mod subsets;
#[cfg(test)]
mod tests;

pub use problem::{
    HeadCost, Hole, LAYERS_MAX, LayerCost, LinkCost, Objective, Overhead, Plan, PlannedStage, PreviousStage, Problem,
    ProductCost, Rate, Refusal, ScratchCost, WORKERS_MAX, WorkerResources,
};
pub use shares::even_shares;
pub use solve::{EXACT_WORKERS_MAX, plan};
