// tiles_8: cooperative matrices of 8 by 8; joined to shaders of prefill `fast`, or tiles_16 is.
const EDGE: u32 = 8u;
alias RowTile = coop_mat8x8<f16, A>;
alias WeightTile = coop_mat8x8<f16, B>;
alias SumTile = coop_mat8x8<f32, C>;
