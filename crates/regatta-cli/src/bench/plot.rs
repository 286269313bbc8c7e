//! Draws rows as an SVG plot: bandwidth and time against bytes, on logarithmic axes.

use super::op::Op;
use super::row::Row;
use std::fmt::Write as _;

// All lengths are in pixels.
const WIDTH: f64 = 1240.0;
const TOP: f64 = 64.0;
const LEFT: [f64; 2] = [76.0, 696.0];
const PANEL_WIDTH: f64 = 520.0;
/// Of a panel: in a plot of one operation, and in a plot of several.
const PANEL_HEIGHTS: [f64; 2] = [400.0, 280.0];
/// Space above a panel for the operation's name, and below it for the axis.
const HEAD: f64 = 34.0;
const FOOT: f64 = 66.0;
const LEGEND_LINE: f64 = 21.0;
/// Approximate width of a character.
const CHARACTER_WIDTH: f64 = 6.9;
/// People with any colour vision can distinguish these (Tol 2021, "Colour Schemes", bright and muted).
const COLOURS: [&str; 10] = [
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#e08214", "#555555", "#332288",
    "#999933",
];
const DASHES: [&str; 4] = ["", "7 4", "2 3", "9 3 2 3"];

/// The points of one line: bytes, GB/s and microseconds.
type Points = Vec<[f64; 3]>;

/// One line. Its colour stands for the algorithm, its dashes for the transport, its markers for the number of ranks.
#[derive(Debug)]
struct Line {
    name: String,
    points: Points,
    colour: &'static str,
    dashes: &'static str,
    shape: usize,
}

/// The plot as SVG: bandwidths and times for each operation.
pub fn draw(title: &str, rows: &[Row]) -> String {
    let ops = distinct(rows.iter().map(|row| row.op));
    let x = Axis::of(rows.iter().map(|row| row.bytes as f64).filter(|&bytes| bytes > 0.0), 2.0);
    let height = PANEL_HEIGHTS[usize::from(ops.len() > 1)];
    let (mut body, mut top) = (String::new(), TOP);
    for op in ops {
        let lines = lines(rows, op);
        let panels = [
            (1, "bus bandwidth (GB/s)", label_number as fn(f64) -> String),
            (2, "time (median of rank 0)", label_time),
        ];
        let shown = panels.into_iter().filter(|panel| values(&lines, panel.0).next().is_some());
        for (left, (value, what, label)) in LEFT.into_iter().zip(shown) {
            let y = Axis::of(values(&lines, value), 10.0);
            let panel = Panel { left, top: top + HEAD, height, x: &x, y: &y };
            panel.frame(&mut body, &format!("{op}: {what}"), label);
            lines.iter().for_each(|line| panel.curve(&mut body, line, value));
        }
        top = legend(&mut body, &lines, top + HEAD + height + FOOT) + 18.0;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{top:.0}\" \
         viewBox=\"0 0 {WIDTH} {top:.0}\" font-family=\"Helvetica, Arial, sans-serif\" font-size=\"12\" fill=\"#333\">\n\
         <rect width=\"{WIDTH}\" height=\"{top:.0}\" fill=\"white\"/>\n\
         <text x=\"{}\" y=\"36\" font-size=\"19\" font-weight=\"bold\" text-anchor=\"middle\">{}</text>\n\
         {body}</svg>\n",
        WIDTH / 2.0,
        escape(title)
    )
}

/// Draws the legend. Returns where it ends.
fn legend(svg: &mut String, lines: &[Line], top: f64) -> f64 {
    let longest = lines.iter().map(|line| line.name.chars().count()).max().unwrap_or(0);
    let columns = (((WIDTH - 100.0) / (longest as f64 * CHARACTER_WIDTH + 56.0)) as usize).clamp(1, 4);
    for (index, line) in lines.iter().enumerate() {
        let (column, row) = (index % columns, index / columns);
        let left = LEFT[0] + column as f64 * (WIDTH - 100.0) / columns as f64;
        let at = top + row as f64 * LEGEND_LINE;
        // Writing into a string does not fail.
        let _ = writeln!(
            svg,
            "<line x1=\"{left:.1}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\" {}/>",
            left + 30.0,
            line.stroke()
        );
        line.marker(svg, left + 15.0, at);
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            left + 38.0,
            at + 4.0,
            escape(&line.name)
        );
    }
    top + lines.len().div_ceil(columns) as f64 * LEGEND_LINE
}

/// A line for each transport, algorithm and number of ranks. An operation without data is a horizontal line.
fn lines(rows: &[Row], op: Op) -> Vec<Line> {
    // From the rows of all operations, so that an algorithm has the same colour everywhere.
    let algorithms = distinct(rows.iter().map(Row::by));
    let transports = distinct(rows.iter().map(|row| row.transport.as_str()));
    let worlds = distinct(rows.iter().map(|row| row.world));
    let mut lines: Vec<Line> = vec![];
    for row in rows.iter().filter(|row| row.op == op) {
        let (name, point) = (row.line(), [row.bytes as f64, row.busbw_gbs, row.median_us]);
        match lines.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.push(point),
            None => lines.push(Line {
                name,
                points: vec![point],
                colour: COLOURS[position(&algorithms, &row.by()) % COLOURS.len()],
                dashes: DASHES[position(&transports, &row.transport.as_str()) % DASHES.len()],
                shape: position(&worlds, &row.world),
            }),
        }
    }
    lines.iter_mut().for_each(|line| line.points.sort_by(|a, b| a[0].total_cmp(&b[0])));
    let least = rows.iter().map(|row| row.bytes).filter(|&bytes| bytes > 0).min().unwrap_or(1) as f64;
    let most = rows.iter().map(|row| row.bytes).max().unwrap_or(1).max(2) as f64;
    for line in lines.iter_mut().filter(|line| line.points.iter().all(|point| point[0] == 0.0)) {
        let us = line.points[0][2];
        line.points = vec![[least, 0.0, us], [most, 0.0, us]];
    }
    lines
}

/// The values without repetitions, in their order.
fn distinct<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = vec![];
    for value in values {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}

fn position<T: PartialEq>(list: &[T], value: &T) -> usize {
    list.iter().position(|known| known == value).unwrap_or(0)
}

/// The values that can be shown on a logarithmic axis.
fn values(lines: &[Line], which: usize) -> impl Iterator<Item = f64> {
    lines.iter().flat_map(|line| &line.points).map(move |point| point[which]).filter(|&value| value > 0.0)
}

/// A logarithmic axis from `base^low` to `base^high`.
struct Axis {
    base: f64,
    low: f64,
    high: f64,
}

impl Axis {
    fn of(values: impl Iterator<Item = f64>, base: f64) -> Self {
        let (least, most) = values.fold((f64::INFINITY, 0f64), |(low, high), x| (low.min(x), high.max(x)));
        let (least, most) = if least <= most { (least, most) } else { (1.0, base) };
        // A value that differs from a whole power only by rounding counts as that power.
        let low = (least.ln() / base.ln() + 1e-9).floor();
        let high = (most.ln() / base.ln() - 1e-9).ceil();
        Self { base, low, high: high.max(low + 1.0) }
    }

    /// The position of `value` on the axis, 0 to 1.
    fn position(&self, value: f64) -> f64 {
        (value.ln() / self.base.ln() - self.low) / (self.high - self.low)
    }

    /// The exponents that get a label.
    fn ticks(&self, at_most: usize) -> impl Iterator<Item = f64> {
        let powers = (self.high - self.low) as usize;
        let step = (powers / at_most.max(1) + 1).max(1);
        (0..=powers).step_by(step).map(move |power| self.low + power as f64)
    }
}

/// The position and the axes of a panel.
struct Panel<'a> {
    left: f64,
    top: f64,
    height: f64,
    x: &'a Axis,
    y: &'a Axis,
}

impl Panel<'_> {
    fn across(&self, value: f64) -> f64 {
        self.left + self.x.position(value) * PANEL_WIDTH
    }

    fn up(&self, value: f64) -> f64 {
        self.top + (1.0 - self.y.position(value)) * self.height
    }

    fn frame(&self, svg: &mut String, name: &str, label: fn(f64) -> String) {
        let Self { left, top, height, x, y } = *self;
        let (right, bottom) = (left + PANEL_WIDTH, top + height);
        let _ = writeln!(
            svg,
            "<text x=\"{left}\" y=\"{:.1}\" font-size=\"14\" font-weight=\"bold\">{}</text>",
            top - 12.0,
            escape(name)
        );
        for power in y.low as i32..y.high as i32 {
            for digit in 2..10 {
                let at = self.up(f64::from(digit) * y.base.powi(power));
                grid(svg, [left, at, right, at], "#f1f1f1");
            }
        }
        for power in x.ticks(9) {
            let value = x.base.powf(power);
            let at = self.across(value);
            grid(svg, [at, top, at, bottom], "#e2e2e2");
            let under = bottom + 18.0;
            let text = label_bytes(value);
            let _ =
                writeln!(svg, "<text x=\"{at:.1}\" y=\"{under:.1}\" text-anchor=\"middle\">{text}</text>");
        }
        for power in y.ticks(10) {
            let value = y.base.powf(power);
            let at = self.up(value);
            grid(svg, [left, at, right, at], "#d8d8d8");
            let (beside, text) = (left - 7.0, label(value));
            let _ = writeln!(
                svg,
                "<text x=\"{beside:.1}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>",
                at + 4.0
            );
        }
        let _ = writeln!(
            svg,
            "<rect x=\"{left}\" y=\"{top:.1}\" width=\"{PANEL_WIDTH}\" height=\"{height}\" fill=\"none\" \
             stroke=\"#777\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">data on each rank (bytes)</text>",
            left + PANEL_WIDTH / 2.0,
            bottom + 38.0
        );
    }

    fn curve(&self, svg: &mut String, line: &Line, value: usize) {
        let shown = line.points.iter().filter(|point| point[0] > 0.0 && point[value] > 0.0);
        let points: Vec<(f64, f64)> =
            shown.map(|point| (self.across(point[0]), self.up(point[value]))).collect();
        if points.is_empty() {
            return;
        }
        let list: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(svg, "<polyline points=\"{}\" fill=\"none\" {}/>", list.join(" "), line.stroke());
        for (x, y) in points {
            line.marker(svg, x, y);
        }
    }
}

fn grid(svg: &mut String, [x1, y1, x2, y2]: [f64; 4], colour: &str) {
    let _ = writeln!(
        svg,
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\"/>"
    );
}

impl Line {
    fn stroke(&self) -> String {
        let dashes = match self.dashes {
            "" => String::new(),
            dashes => format!(" stroke-dasharray=\"{dashes}\""),
        };
        format!("stroke=\"{}\" stroke-width=\"1.8\"{dashes}", self.colour)
    }

    fn marker(&self, svg: &mut String, x: f64, y: f64) {
        let shape = match self.shape % 4 {
            0 => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.2\""),
            1 => format!("<rect x=\"{:.1}\" y=\"{:.1}\" width=\"6\" height=\"6\"", x - 3.0, y - 3.0),
            2 => format!("<path d=\"M{x:.1} {:.1} l4 7 h-8 z\"", y - 4.4),
            _ => format!("<path d=\"M{x:.1} {:.1} l4 4 l-4 4 l-4 -4 z\"", y - 4.0),
        };
        let _ = writeln!(svg, "{shape} fill=\"{}\" stroke=\"white\" stroke-width=\"0.8\"/>", self.colour);
    }
}

fn label_bytes(bytes: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB"];
    let unit = ((bytes.log2() / 10.0 + 1e-9) as usize).min(units.len() - 1);
    format!("{} {}", bytes / 1024f64.powi(unit as i32), units[unit])
}

/// A power of ten without needless digits.
fn label_number(value: f64) -> String {
    let digits = (-value.log10()).round().max(0.0) as usize;
    format!("{value:.digits$}")
}

fn label_time(us: f64) -> String {
    let (value, unit) = match us {
        us if us >= 0.999e6 => (us / 1e6, "s"),
        us if us >= 0.999e3 => (us / 1e3, "ms"),
        us if us >= 0.999 => (us, "us"),
        us => (us * 1e3, "ns"),
    };
    format!("{} {unit}", label_number(value))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::row::tests::row;
    use super::*;

    /// Checks that every element is closed in order, and that no attribute is NaN or infinite.
    fn well_formed(svg: &str) {
        let mut open = vec![];
        for tag in svg.split('<').skip(1) {
            let (tag, text) = tag.split_once('>').unwrap();
            assert!(!text.contains('>') && tag.matches('"').count() % 2 == 0, "{tag}");
            match tag.strip_prefix('/') {
                Some(name) => assert_eq!(open.pop(), Some(name)),
                None if tag.ends_with('/') => {}
                None => open.push(tag.split_whitespace().next().unwrap()),
            }
        }
        assert!(open.is_empty() && !svg.contains("NaN") && !svg.contains("inf"), "{open:?}");
    }

    #[test]
    fn every_line_has_as_many_points_as_sizes() {
        let sizes = [4, 1 << 10, 1 << 20, 64 << 20];
        let mut rows = vec![row(Op::Barrier, "dissemination", 0, 2.5)];
        for algorithm in ["ring", "tree", "a<b&c"] {
            rows.extend(sizes.map(|bytes| row(Op::AllReduce, algorithm, bytes, 1.0 + bytes as f64 / 5e3)));
        }
        let svg = draw("Sizes & <times>", &rows);
        well_formed(&svg);
        let points = |line: &str| line.split('"').nth(1).unwrap().split(' ').count();
        let counts: Vec<usize> =
            svg.lines().filter(|line| line.starts_with("<polyline")).map(points).collect();
        // The barrier's horizontal line, then three lines in each of the two panels.
        assert_eq!(counts, [2, 4, 4, 4, 4, 4, 4]);
        for text in ["64 MiB", "bus bandwidth (GB/s)", "10 us", "a&lt;b&amp;c", "Sizes &amp; &lt;times&gt;"] {
            assert!(svg.contains(text), "{text} in {svg}");
        }
    }

    #[test]
    fn few_rows_are_drawn() {
        well_formed(&draw("none", &[]));
        well_formed(&draw("barrier", &[row(Op::Barrier, "direct", 0, 1.0)]));
        well_formed(&draw("one", &[row(Op::AllReduce, "ring", 4, 1.0)]));
        well_formed(&draw("no time", &[row(Op::AllReduce, "ring", 0, 0.0)]));
    }

    #[test]
    fn axes_are_named_in_units() {
        assert_eq!(
            [label_bytes(4.0), label_bytes(1024.0), label_bytes(2f64.powi(26))],
            ["4 B", "1 KiB", "64 MiB"]
        );
        assert_eq!([label_number(100.0), label_number(0.001)], ["100", "0.001"]);
        assert_eq!([label_time(0.1), label_time(1e4), label_time(1e6)], ["100 ns", "10 ms", "1 s"]);
    }
}
