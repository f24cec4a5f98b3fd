// Line charts that keep their text size at any width, drawn from the table of a figure or from numbers.

const FEW = 16;
const MARKS = [
  'M4 0A4 4 0 1 1-4 0 4 4 0 1 1 4 0z', 'M-3.6-3.6H3.6V3.6H-3.6z', 'M0-5 5 0 0 5-5 0z', 'M0-4.8 4.6 3.6H-4.6z', 'M0 4.8 4.6-3.6H-4.6z',
  'M-4-1.3H-1.3V-4H1.3V-1.3H4V1.3H1.3V4H-1.3V1.3H-4z',
];

// About n round numbers whose first and last enclose the range.
function ticks(low, high, n) {
  if (high <= low) { const pad = Math.abs(low) / 10 || 1; low -= pad; high += pad; }
  const rough = (high - low) / n, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => +((first + i) * step).toPrecision(12));
}

const isBinary = (x) => Number.isInteger(Math.log2(x)) && x >= 1024;
// A count for an axis: powers of two as 64K (of 1,024), others as 10k or 2M.
function short(x) {
  if (isBinary(x)) return x >= 2 ** 20 ? `${x / 2 ** 20}M` : `${x / 1024}K`;
  const [unit, suffix] = [[1e9, 'G'], [1e6, 'M'], [1e3, 'k']].find(([size]) => Math.abs(x) >= size) || [1, ''];
  return `${+(x / unit).toPrecision(4)}${suffix}`;
}

// The ticks of x, each with whether a narrow screen leaves out its label.
function xTicks(from, to, own, log) {
  const sparse = (all, major) => all.map((x, i) => [x, all.length > 4 && !major(x, i)]);
  if (!log) return sparse(ticks(from, to, 5).filter((x) => x >= from && x <= to), (_, i) => i % 2 === 0);
  if (own.length <= 12) return sparse(own, (_, i) => (own.length - 1 - i) % 2 === 0);
  const powers = Array.from({ length: 40 }, (_, i) => 10 ** (i - 20)), steps = to / from < 1e4 ? [1, 2, 5] : [1];
  return sparse(powers.flatMap((p) => steps.map((m) => m * p)).filter((x) => x >= from && x <= to), (x) => Number.isInteger(Math.log10(x)));
}

// Where each line begins and ends, and how far it goes, in words.
const described = (lines) => lines.map(({ name, points }) => {
  const known = points.filter((p) => Number.isFinite(p[1])), ys = known.map((p) => p[1]);
  if (!known.length) return `${name}: not measured.`;
  const at = (p) => `${number(p[1], 4)} at ${whole(p[0])}`;
  return `${name}: from ${at(known[0])} to ${at(known.at(-1))}, between ${number(Math.min(...ys), 4)} and ${number(Math.max(...ys), 4)}.`;
}).join(' ');

// Draws lines [{ name, slot, points: [[x, y, low, high], ...] }]; NaN leaves a gap. Returns the places of x, from 0 to 1, and a cursor.
function draw(area, { lines, title, height, logX = false, logY = false, floor, ceiling, reference, format = (y) => number(y, 4) }) {
  const ys = lines.flatMap((line) => line.points.flatMap((p) => p.slice(1))).filter(Number.isFinite);
  if (reference) ys.push(reference[0]);
  let low = floor ?? Math.min(...ys), high = ceiling ?? Math.max(...ys);
  if (!ys.length) { low = 0; high = 1; }
  if (logY && low === high) { low /= 2; high *= 2; }
  const yTicks = logY ? [low, Math.sqrt(low * high), high] : ticks(low, high, Math.max(2, Math.floor(height / 60)));
  low = yTicks[0]; high = yTicks.at(-1);
  const own = [...new Set(lines.flatMap((line) => line.points.map((p) => p[0])))].sort((a, b) => a - b);
  let from = own[0], to = own.at(-1);
  logX &&= from > 0;
  if (from === to) [from, to] = logX ? [from / 2, to * 2] : [from - 1, to + 1];

  const across = (x) => (logX ? Math.log(x / from) / Math.log(to / from) : (x - from) / (to - from));
  const down = (y) => height * (1 - (logY ? Math.log(y / low) / Math.log(high / low) : (y - low) / (high - low)));
  const percent = (x) => `${(100 * across(x)).toFixed(2)}%`;
  const path = (points) => {
    let pen = 'M';
    return points.map(([x, y]) => {
      if (!Number.isFinite(y)) { pen = 'M'; return ''; }
      const step = `${pen}${(1000 * across(x)).toFixed(1)} ${down(y).toFixed(1)}`;
      pen = 'L';
      return step;
    }).join('');
  };
  const few = ({ points }) => points.length <= FEW;
  const measured = (p) => Number.isFinite(p[2]) && Number.isFinite(p[3]);

  function line(each) {
    const band = few(each) ? [] : each.points.filter(measured), sides = [band.map((p) => [p[0], p[3]]), band.map((p) => [p[0], p[2]]).reverse()];
    const shapes = [...(band.length ? [make('svg:path', { class: 'bd', d: `${path(sides.flat())}z` })] : []), make('svg:path', { class: 'ln', d: path(each.points) })];
    const stretched = make('svg:svg', { width: '100%', height, viewBox: `0 0 1000 ${height}`, preserveAspectRatio: 'none', overflow: 'visible' }, ...shapes);
    return make('svg:g', { class: `s${each.slot}` }, stretched, ...(few(each) ? each.points.filter((p) => Number.isFinite(p[1])).map((p) => point(p, each.slot)) : []));
  }
  function point(p, slot) {
    const [top, bottom] = [down(p[3]), down(p[2])], y = down(p[1]);
    const bar = measured(p) && bottom - top > 0.5 ? [make('svg:path', { class: 'eb', d: `M0 ${top}V${bottom}M-4 ${top}H4M-4 ${bottom}H4` })] : [];
    return make('svg:svg', { x: percent(p[0]), overflow: 'visible', width: 1, height: 1 }, ...bar, make('svg:path', { class: 'mk', transform: `translate(0 ${y})`, d: MARKS[slot] }));
  }
  // The names where the lines end, moved apart where they would overlap; a line that ends early carries its name above.
  const clip = (name) => (name.length <= 28 ? name : `${name.slice(0, 27).trimEnd()}…`);
  function ends() {
    const labels = lines.map(({ name, slot, points }) => ({ name, slot, last: points.findLast((p) => Number.isFinite(p[1])) }))
      .filter(({ last }) => last).map((label) => ({ ...label, early: label.last[0] < to, y: down(label.last[1]) }));
    const right = labels.filter(({ early }) => !early).sort((a, b) => a.y - b.y);
    right.forEach((label, i) => { if (i) label.y = Math.max(label.y, right[i - 1].y + 16); });
    const over = Math.max(0, (right.at(-1)?.y ?? 0) - height);
    return labels.map(({ name, slot, y, early, last }) => make('svg:text',
      { class: `end s${slot}`, x: percent(last[0]), dx: 12, y: early ? y - 8 : y - over + 4 }, clip(name)));
  }
  const named = lines.length > 1 && area.classList.contains('named');
  area.style.setProperty('--gutter', `${named ? 24 + Math.round(7.7 * Math.max(...lines.map(({ name }) => clip(name).length))) : 16}px`);
  const cursor = make('svg:line', { class: 'at', y1: 0, y2: height, visibility: 'hidden' });
  const svg = make('svg:svg', { role: 'img', 'aria-label': `${title}. ${described(lines)}`, width: '100%', height },
    ...yTicks.flatMap((y) => [make('svg:line', { class: 'gl', x1: 0, x2: '100%', y1: down(y), y2: down(y) }),
      make('svg:text', { x: -8, y: down(y) + 4, 'text-anchor': 'end' }, format(y))]),
    ...xTicks(from, to, own, logX).flatMap(([x, minor]) => [make('svg:line', { class: 'gl', x1: percent(x), x2: percent(x), y1: height, y2: height + 5 }),
      make('svg:text', { class: minor ? 'minor' : '', x: percent(x), y: height + 20, 'text-anchor': 'middle' }, short(x))]),
    ...(reference ? [make('svg:line', { class: 'ref', x1: 0, x2: '100%', y1: down(reference[0]), y2: down(reference[0]) }),
      make('svg:text', { x: '100%', dx: -6, y: down(reference[0]) - 6, 'text-anchor': 'end' }, reference[1])] : []),
    ...lines.map(line), ...(named ? ends() : []), cursor);
  area.replaceChildren(svg);
  const move = (x) => {
    cursor.setAttribute('visibility', 'visible');
    ['x1', 'x2'].forEach((end) => cursor.setAttribute(end, percent(x)));
  };
  return { svg, across, move, from, to, binary: logX && own.some(isBinary) };
}

function legend(lines) {
  const key = (each) => make('svg:svg', { class: `s${each.slot}`, width: 28, height: 12, 'aria-hidden': 'true' }, make('svg:path', { class: 'ln', d: 'M0 6H28' }),
    ...(each.points?.length <= FEW ? [make('svg:path', { class: 'mk', transform: 'translate(14 6)', d: MARKS[each.slot] })] : []));
  return make('ul', { class: 'legend' }, ...lines.map((each) => make('li', {}, key(each), each.name)));
}

// A figure with a table: its cells are `y`, `y (low to high)` or `y (low to high, n = trials)`.
function chart(figure) {
  const table = figure.querySelector('table'), plot = figure.querySelector('.plot'), { height, log, floor, ceiling, reference, said } = figure.dataset;
  const [first, ...heads] = table.tHead.rows[0].cells;
  const rows = [...table.tBodies[0].rows].map((row) => { const [x, ...cells] = [...row.cells].map((cell) => cell.textContent.trim()); return { x: +x, cells }; });
  const lines = heads.map((head, k) => ({ name: head.textContent, slot: +head.dataset.slot, points: rows.filter((row) => row.cells[k])
    .map((row) => [row.x, ...(row.cells[k].match(/^(\S+)(?: \((\S+) to ([^,)]+))?/).slice(1).map((part) => (part === undefined ? NaN : +part)))]) }));
  const given = (value) => (value === undefined ? undefined : +value);
  const drawn = draw(plot, { lines, title: figure.querySelector('figcaption').textContent, height: +height, logX: log === '1', floor: given(floor), ceiling: given(ceiling),
    reference: reference === undefined ? null : [+reference, said] });
  if (drawn.binary) figure.querySelector('.xlabel').append('; 1K = 1,024');
  if (lines.length > 1) figure.querySelector('figcaption').after(legend(lines));

  const tip = make('div', { class: 'tip', role: 'status' });
  plot.append(tip);
  plot.tabIndex = 0;
  plot.setAttribute('role', 'group');
  plot.setAttribute('aria-label', 'Chart: left and right arrow keys step through the points');
  let now = -1;
  const hide = () => { tip.hidden = true; drawn.svg.querySelector('.at').setAttribute('visibility', 'hidden'); now = -1; };
  const show = (k) => {
    if (k === now) return;
    now = k;
    const { x, cells } = rows[k];
    tip.replaceChildren(make('b', {}, `${first.textContent.replace(/ \(.*\)/, '')} ${x.toLocaleString('en')}`),
      ...cells.flatMap((cell, i) => (cell ? [make('span', {}, cells.length > 1 ? `${lines[i].name}: ${cell}` : cell)] : [])));
    tip.hidden = false;
    drawn.move(x);
    const box = drawn.svg.getBoundingClientRect(), outer = plot.getBoundingClientRect(), left = box.left - outer.left + drawn.across(x) * box.width;
    tip.style.left = `${clamp(left > outer.width / 2 ? left - tip.offsetWidth - 14 : left + 14, 0, Math.max(0, outer.width - tip.offsetWidth))}px`;
  };
  plot.addEventListener('pointermove', (event) => {
    const box = drawn.svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width;
    const far = (row) => Math.abs(drawn.across(row.x) - at);
    show(rows.reduce((best, row, k) => (far(row) < far(rows[best]) ? k : best), 0));
  });
  plot.addEventListener('pointerleave', hide);
  plot.addEventListener('blur', hide);
  plot.addEventListener('keydown', (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === 'Escape') hide();
    if (!step) return;
    event.preventDefault();
    show(clamp(now + step, 0, rows.length - 1));
  });
  hide();
}
document.addEventListener('DOMContentLoaded', () => document.querySelectorAll('figure.chart').forEach(chart));
