// tiles_16: cooperative matrices of 16 by 16; joined to shaders of prefill `fast`, or tiles_8 is.
const EDGE: u32 = 16u;
alias RowTile = coop_mat16x16<f16, A>;
alias WeightTile = coop_mat16x16<f16, B>;
alias SumTile = coop_mat16x16<f32, C>;
