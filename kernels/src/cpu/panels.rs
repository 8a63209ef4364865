//! Results of products as threads leave them: panels, each some outputs of all rows of a product, row after row.
//!
//! A panel belongs to one thread, which writes it from front to back; afterwards the rows are put together from their parts. It does
//! not know what the numbers are.

/// Where the results of one row lie.
#[derive(Clone, Copy, Default)]
pub(super) struct PanelRow {
    /// Where the panels of the row's product begin.
    pub(super) start: usize,
    /// Rows of that product.
    pub(super) rows: usize,
    /// This row's place among them.
    pub(super) index: usize,
}

impl PanelRow {
    /// The row's results, outputs ascending, in the parts that they lie in: `step` outputs in each panel but the last.
    pub(super) fn parts(self, panels: &[f32], outputs: usize, step: usize) -> impl Iterator<Item = &[f32]> {
        panels[self.start..][..outputs * self.rows].chunks(step * self.rows).map(move |panel| {
            let width = panel.len() / self.rows;
            &panel[self.index * width..][..width]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_found_in_every_panel() {
        // Two rows of five outputs, three outputs a panel: row r has r0, r1, r2 | r3, r4.
        let panels = [9.0, 0.0, 0.1, 0.2, 1.0, 1.1, 1.2, 0.3, 0.4, 1.3, 1.4];
        for index in 0..2 {
            let row = PanelRow { start: 1, rows: 2, index };
            let found: Vec<f32> = row.parts(&panels, 5, 3).flatten().copied().collect();
            let want: Vec<f32> = (0..5).map(|n| index as f32 + n as f32 / 10.0).collect();
            assert_eq!(found, want);
        }
    }
}
