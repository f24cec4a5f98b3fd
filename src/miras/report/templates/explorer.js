// A text coloured by surprise, token by token, and what the memories did along it.

const STEPS = 24;
const COLUMNS = 360;
const AROUND = 100;

function quantile(sorted, share) {
  const place = share * (sorted.length - 1), low = Math.floor(place);
  const high = Math.min(low + 1, sorted.length - 1);
  return sorted[low] + (sorted[high] - sorted[low]) * (place - low);
}

function below(sorted, value) {
  let low = 0, high = sorted.length;
  while (low < high) { const mid = (low + high) >> 1; if (sorted[mid] < value) low = mid + 1; else high = mid; }
  return low;
}

// What is in the page

async function unpack(meta) {
  const packed = Uint8Array.from(atob(meta.blob), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('deflate'));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  let from = 0;
  const take = (length) => bytes.slice(from, (from += length));
  const text = new TextDecoder('utf-8', { ignoreBOM: true }).decode(take(meta.text));
  const lengths = new Uint16Array(take(2 * meta.tokens).buffer);
  const tracks = meta.tracks.map((track) => ({ ...track, codes: take(Math.ceil(meta.tokens / track.every)) }));
  return { ...meta, text, lengths, tracks };
}

function decode(track) {
  const { floor, top, least, most } = track;
  const even = least !== undefined;
  const table = Float32Array.from({ length: 256 }, (_, code) => (even ? least + ((most - least) * code) / 254 : floor * (top / floor) ** ((code - 1) / 253)));
  if (!even) table[0] = 0;
  table[255] = NaN;
  return Float32Array.from(track.codes, (code) => table[code]);
}

// A unit is what is shown as one: the tokens that complete a piece of text, mostly one of them.
function unitsOf({ lengths, tokens }) {
  const first = [], at = [], of = new Uint32Array(tokens);
  let open = 0, place = 0;
  for (let t = 0; t < tokens; t++) {
    of[t] = first.length;
    if (!lengths[t]) continue;
    first.push(open);
    at.push(place);
    open = t + 1;
    place += lengths[t];
  }
  if (!first.length) { first.push(0); at.push(0); }
  for (let t = open; t < tokens; t++) of[t] = first.length - 1;
  first.push(tokens);
  at.push(place);
  return { first, at, of, count: first.length - 1 };
}

function explorer(data) {
  const { text, tokens, tracks, quantities } = data;
  const units = unitsOf(data);
  const textOf = (unit) => text.slice(units.at[unit], units.at[unit + 1]);
  const layers = [...new Set(tracks.map((track) => track.layer).filter((layer) => layer !== null))];
  const names = Object.keys(quantities);
  const kinds = names.filter((name) => ['predictive', 'momentary', 'accumulated'].includes(name));
  const gates = names.filter((name) => !kinds.includes(name));
  const view = { kind: kinds.includes(data.kind) ? data.kind : 'predictive', layer: layers[0] ?? null, head: null, at: 0 };

  // The values of a quantity in a layer and head; head null is the mean over heads.
  const known = new Map();
  function series(name, layer, head) {
    if (name === 'predictive') layer = head = null;
    const key = `${name} ${layer} ${head}`;
    if (!known.has(key)) {
      const here = tracks.filter((track) => track.name === name && track.layer === layer);
      const exact = here.find((track) => track.head === head);
      if (!exact && !here.length) return null;
      const parts = (exact ? [exact] : here).map(decode);
      const values = parts[0].map((_, i) => parts.reduce((sum, part) => sum + part[i], 0) / parts.length);
      known.set(key, fit({ values, every: here[0].every, floor: (exact || here[0]).floor }));
    }
    return known.get(key);
  }

  // Colours span the 5 % to 99.5 % quantiles, at most two decades.
  function fit(found) {
    const sorted = found.values.filter(Number.isFinite).sort();
    let high = sorted.length ? quantile(sorted, 0.995) || sorted.at(-1) : 0;
    let low = sorted.length && high ? Math.max(quantile(sorted, 0.05), high / 100) : 0;
    if (!high) { low = 1; high = 10; }
    if (high <= low * 1.000001) { low /= 10; high *= 10; }
    return { ...found, sorted, low, high };
  }
  const level = (column, value) => (Number.isNaN(value) ? -1
    : value <= 0 ? 0 : clamp(Math.floor((STEPS * Math.log(value / column.low)) / Math.log(column.high / column.low)), 0, STEPS - 1));
  // The style sheet makes a colour of --heat, from 0 to 1; what was not measured has none.
  function heat(node, rank) {
    node.classList.toggle('heat', rank >= 0);
    node.classList.toggle('unknown', rank < 0);
    node.style.setProperty('--heat', (Math.max(0, rank) / (STEPS - 1)).toFixed(3));
    return node;
  }
  const chosen = () => series(view.kind, view.layer, view.head);
  const valueAt = (found, token) => found.values[Math.floor(token / found.every)];
  const readable = (name, value, found) => (Number.isNaN(value) ? 'not measured'
    : name === 'forget' ? (1 - value).toLocaleString('en', { maximumFractionDigits: 4 })
      : value === 0 && found.floor && found.sorted.at(-1) > 0 ? `under ${number(found.floor)}` : number(value));
  const share = (found, value) => `above ${Math.floor((100 * below(found.sorted, value)) / found.sorted.length)} %`;
  const strongest = (unit) => {
    const { values } = chosen();
    let best = units.first[unit];
    for (let t = best + 1; t < units.first[unit + 1]; t++) if (values[t] > values[best] || Number.isNaN(values[best])) best = t;
    return best;
  };
  const spoken = (sign) => ({ ' ': 'space', '\n': 'line break', '\t': 'tab', '': 'nothing' })[sign] ?? sign;
  const drawn = (sign) => (sign.trim() ? sign : sign.replace(/ /g, '␣').replace(/\n/g, '↵').replace(/\t/g, '⇥') || '∅');

  // The text: blocks of plain text, of which those near the view have an element for each unit.

  const ink = get('ink');
  const blocks = [];
  const blockOf = new Uint32Array(units.count);
  for (let from = 0, u = 0; u < units.count; u++) {
    const size = units.at[u + 1] - units.at[from], end = textOf(u);
    if (u === units.count - 1 || (size >= 500 && end.endsWith('\n')) || (size >= 3000 && /\s$/.test(end)) || size >= 6000) {
      blockOf.fill(blocks.length, from, u + 1);
      blocks.push({ from, to: u + 1, node: make('div'), spans: null });
      from = u + 1;
    }
  }

  function fill(node, string) {
    for (const part of string.split(/([\n\t])/)) {
      if (part === '\n' || part === '\t') node.append(make('b', { class: part === '\n' ? 'newline' : 'tab' }));
      if (part) node.append(part);
    }
  }
  function dress(block) {
    const column = chosen(), current = units.of[view.at];
    block.spans.forEach((span, k) => {
      const unit = block.from + k;
      heat(span, level(column, column.values[strongest(unit)])).classList.toggle('current', unit === current);
    });
  }
  function paint(block) {
    block.spans = [];
    for (let unit = block.from; unit < block.to; unit++) {
      const span = make('i');
      span.unit = unit;
      fill(span, textOf(unit));
      block.spans.push(span);
    }
    dress(block);
    block.node.replaceChildren(...block.spans);
  }
  function undress(block) {
    block.spans = null;
    block.node.textContent = text.slice(units.at[block.from], units.at[block.to]);
  }
  function blockAt(y) {
    let low = 0, high = blocks.length - 1;
    while (low < high) {
      const mid = (low + high) >> 1, { node } = blocks[mid];
      if (node.offsetTop + node.offsetHeight <= y) low = mid + 1; else high = mid;
    }
    return low;
  }
  const margin = () => Math.max(600, ink.clientHeight);
  function paintNear() {
    const first = blockAt(ink.scrollTop - margin()), last = blockAt(ink.scrollTop + ink.clientHeight + margin());
    const fresh = blocks.slice(first, last + 1).filter((block) => !block.spans);
    blocks.forEach((block, k) => { if (block.spans && (k < first - 2 || k > last + 2)) undress(block); });
    fresh.forEach(paint);
  }
  // The token at a height in the text, from its block's share.
  function tokenAt(y) {
    const block = blocks[blockAt(y)], { offsetTop, offsetHeight } = block.node;
    const unit = block.from + Math.floor((block.to - block.from) * clamp((y - offsetTop) / (offsetHeight || 1), 0, 0.9999));
    return units.first[unit];
  }
  function spanOf(unit) {
    const block = blocks[blockOf[unit]];
    if (!block.spans) paint(block);
    return block.spans[unit - block.from];
  }
  const inView = (span) => {
    const box = span.getBoundingClientRect(), frame = ink.getBoundingClientRect();
    return box.top >= frame.top && box.bottom <= frame.bottom;
  };

  // Where one is

  function go(token, { center = false, say = false } = {}) {
    mark(token);
    const span = spanOf(units.of[view.at]);
    if (center || !inView(span)) {
      const box = span.getBoundingClientRect(), frame = ink.getBoundingClientRect();
      ink.scrollTop += box.top - frame.top - (ink.clientHeight - box.height) / 2;
      paintNear();
    }
    if (say) get('say').textContent = sentence(view.at);
    showView();
  }
  function mark(token) {
    const before = blocks[blockOf[units.of[view.at]]];
    view.at = clamp(token, 0, tokens - 1);
    const after = blocks[blockOf[units.of[view.at]]];
    for (const block of new Set([before, after])) if (block.spans) dress(block);
    showToken(view.at);
    showPlace();
  }
  function sentence(token) {
    const column = chosen(), value = valueAt(column, token), { label, unit } = quantities[view.kind];
    const size = Number.isNaN(value) ? 'not measured' : `${readable(view.kind, value, column)} ${unit}, ${share(column, value)} of the text`;
    return `${spoken(textOf(units.of[token]))}, token ${whole(token + 1)} of ${whole(tokens)}: ${label} ${size}`;
  }

  function showToken(token) {
    const unit = units.of[token], column = chosen(), count = units.first[unit + 1] - units.first[unit];
    const sign = get('sign');
    sign.textContent = drawn(textOf(unit));
    heat(sign, level(column, valueAt(column, token)));
    const among = count > 1 ? `, ${token - units.first[unit] + 1} of the ${count} that spell it` : '';
    const earlier = data.before ? `, after ${whole(data.before)} earlier` : '';
    get('place').textContent = `Token ${whole(token + 1)} of ${whole(tokens)}${among}${earlier}`;
    get('values').replaceChildren(...names.flatMap((each) => {
      const found = series(each, view.layer, view.head);
      if (!found) return [];
      const value = valueAt(found, token), kind = kinds.includes(each);
      const remark = kind && !Number.isNaN(value) ? `${quantities[each].unit}, ${share(found, value)} of the text`
        : found.every > 1 ? `mean of ${found.every} tokens` : '';
      return [make('div', each === view.kind ? { class: 'now' } : {}, make('dt', {}, quantities[each].label),
        make('dd', {}, readable(each, value, found)), ...(remark && kind ? [make('span', {}, remark)] : []))];
    }));
    if (get('every').open) showTable(token);
  }
  function showTable(token) {
    const shown = names.filter((name) => name !== 'predictive');
    const rows = layers.flatMap((layer) => [...headsOf(layer), null].map((head) => [layer, head]));
    const cell = (name, layer, head) => {
      const found = series(name, layer, head);
      return make('td', {}, found ? readable(name, valueAt(found, token), found) : '');
    };
    get('table').replaceChildren(
      make('thead', {}, make('tr', {}, ...['layer', 'head', ...shown.map((name) => quantities[name].short)].map((name) => make('th', { scope: 'col' }, name)))),
      make('tbody', {}, ...rows.map(([layer, head]) => make('tr', {}, make('th', { scope: 'row' }, String(layer)),
        make('td', {}, head === null ? 'mean' : String(head)), ...shown.map((name) => cell(name, layer, head))))));
  }
  const headsOf = (layer) => [...new Set(tracks.filter((track) => track.layer === layer && track.head !== null).map((track) => track.head))];

  // The strip

  const slider = get('strip'), sketch = slider.querySelector('svg');
  const columns = Math.min(COLUMNS, tokens), wide = tokens / columns;
  const percent = (token) => `${((100 * token) / tokens).toFixed(3)}%`;
  function means(found, from, to) {
    let sum = 0, count = 0, low = Infinity, high = -Infinity;
    const end = Math.max(Math.ceil(to / found.every), Math.floor(from / found.every) + 1);
    for (let i = Math.floor(from / found.every); i < Math.min(end, found.values.length); i++) {
      const value = found.values[i];
      if (Number.isNaN(value)) continue;
      sum += value; count++; low = Math.min(low, value); high = Math.max(high, value);
    }
    return { mean: count ? sum / count : NaN, low, high };
  }
  function showStrip() {
    const column = chosen();
    const bars = Array.from({ length: columns }, (_, k) => means(column, Math.floor(k * wide), Math.floor((k + 1) * wide)).mean);
    const own = fit({ values: Float32Array.from(bars) });
    sketch.replaceChildren(...bars.map((value, k) => {
      const rank = level(own, value), height = rank < 0 ? 0 : 6 + (50 * rank) / (STEPS - 1);
      return heat(make('svg:rect', { x: `${(100 * k) / columns}%`, width: `${100 / columns + 0.05}%`, y: 64 - height, height }), rank);
    }), ...sharpest().map((token) => make('svg:svg', { x: percent(token), overflow: 'visible', width: 1, height: 1 }, make('svg:path', { class: 'pin', d: 'M-4 1H4L0 7z' }))),
    make('svg:rect', { class: 'view', y: 0, height: 64 }), make('svg:line', { class: 'at', y1: 0, y2: 64 }));
    get('last').textContent = whole(tokens);
    get('columns').textContent = `each column: the mean of ${whole(wide)} token${Math.round(wide) === 1 ? '' : 's'}; ▾ the sharpest moments`;
  }
  function showView() {
    const from = tokenAt(ink.scrollTop + 24), to = tokenAt(ink.scrollTop + ink.clientHeight - 24);
    const frame = sketch.querySelector('.view');
    frame.setAttribute('x', percent(from));
    frame.setAttribute('width', `${Math.max(0.3, (100 * (to - from)) / tokens)}%`);
  }
  function showPlace() {
    const line = sketch.querySelector('.at');
    line.setAttribute('x1', percent(view.at + 0.5));
    line.setAttribute('x2', percent(view.at + 0.5));
    slider.setAttribute('aria-valuemin', 1);
    slider.setAttribute('aria-valuemax', tokens);
    slider.setAttribute('aria-valuenow', view.at + 1);
    slider.setAttribute('aria-valuetext', sentence(view.at));
    showAround();
    document.querySelectorAll('#gate-charts .track').forEach((figure) => figure.move(view.at));
  }

  // Peaks: the highest of their surroundings, and among the highest two in a hundred of the text.

  function peaks() {
    const column = chosen(), { values } = column;
    if (!column.peaks) {
      const bar = column.sorted.length ? quantile(column.sorted, 0.98) : Infinity;
      column.peaks = [];
      for (let t = 0; t < tokens; t++) {
        if (!(values[t] >= bar)) continue;
        let top = true;
        for (let s = Math.max(0, t - 20); top && s <= Math.min(tokens - 1, t + 20); s++) top = !(values[s] > values[t] || (s < t && values[s] === values[t]));
        if (top) column.peaks.push(t);
      }
    }
    return column.peaks;
  }
  function sharpest() {
    const { values } = chosen();
    return [...peaks()].sort((a, b) => values[b] - values[a] || a - b).slice(0, 10);
  }
  function jump(direction) {
    const found = direction > 0 ? peaks().find((t) => t > view.at) : peaks().findLast((t) => t < view.at);
    if (found === undefined) get('say').textContent = `No ${direction > 0 ? 'later' : 'earlier'} peak`;
    else go(found, { center: true, say: true });
  }
  function showMoments() {
    const column = chosen();
    get('moments').replaceChildren(...sharpest().map((token) => {
      const unit = units.of[token], flat = (from, to) => text.slice(units.at[clamp(from, 0, units.count)], units.at[clamp(to, 0, units.count)]).replace(/\s+/g, ' ');
      const reach = Math.max(1, Math.round((30 * units.count) / Math.max(1, text.length)));
      const sign = heat(make('mark', {}, drawn(textOf(unit))), level(column, column.values[token]));
      const button = make('button', { type: 'button' }, make('bdi', {}, `…${flat(unit - reach, unit)}`, sign, `${flat(unit + 1, unit + 1 + reach)}…`),
        make('b', {}, `${number(column.values[token])} ${quantities[view.kind].unit}`));
      button.addEventListener('click', () => { go(token, { center: true, say: true }); ink.focus({ preventScroll: true }); ink.scrollIntoView({ block: 'nearest' }); });
      return make('li', {}, button);
    }));
  }

  // Around the place, and the gates; a click on a chart goes to the token there.

  const pair = ['momentary', 'accumulated'].filter((name) => names.includes(name));
  function plot(area, options) {
    const drawn = draw(area, options);
    area.onclick = (event) => {
      const box = drawn.svg.getBoundingClientRect(), at = clamp((event.clientX - box.left) / box.width, 0, 1);
      go(Math.round(drawn.from + (drawn.to - drawn.from) * at) - 1, { center: true, say: true });
    };
    return (token) => drawn.move(token + 1);
  }
  function showAround() {
    if (!pair.length) return;
    const from = Math.max(0, Math.min(view.at - AROUND, tokens - 1 - 2 * AROUND)), to = Math.min(tokens - 1, from + 2 * AROUND);
    const lines = pair.map((name, slot) => {
      const found = series(name, view.layer, view.head), middle = quantile(found.sorted, 0.5) || found.sorted.at(-1) || 1;
      const points = Array.from({ length: to - from + 1 }, (_, k) => [from + k + 1, found.values[from + k] > 0 ? found.values[from + k] / middle : NaN]);
      return { name: quantities[name].label, slot, points, now: points[view.at - from][1] };
    });
    const said = pair.map((name, k) => `${name} ${Number.isNaN(lines[k].now) ? 'not measured' : `${number(lines[k].now)} times its median`}`).join(', ');
    get('around-said').textContent = `At token ${whole(view.at + 1)}: ${said}`;
    plot(get('around-area'), { lines, logY: true, height: 170, format: (y) => `${number(y, 2)}×`, title: get('around-said').textContent })(view.at);
  }
  function buildAround() {
    get('around-note').textContent = pair.length > 1
      ? 'Momentary surprise is what one token brings; accumulated surprise is what the memory writes with. Each is drawn against its own median over the text.'
      : 'Momentary surprise, against its median over the text. This rule has no momentum, so nothing accumulates.';
    get('around').replaceChildren(legend(pair.map((name, slot) => ({ name: quantities[name].label, slot }))),
      make('figure', { class: 'track' }, make('figcaption', {}, 'Times the median of the text, log scale', make('span', { id: 'around-said' })), make('div', { class: 'plot', id: 'around-area' })));
  }

  function showGates() {
    get('gate-charts').replaceChildren(...gates.flatMap((name) => {
      const found = series(name, view.layer, view.head);
      if (!found) return [];
      const turn = name === 'forget' ? (v) => 1 - v : (v) => v;
      const count = Math.min(240, found.values.length), step = tokens / count;
      const points = Array.from({ length: count }, (_, k) => {
        const { mean, low, high } = means(found, Math.floor(k * step), Math.floor((k + 1) * step));
        return [(k + 0.5) * step + 0.5, turn(mean), Math.min(turn(low), turn(high)), Math.max(turn(low), turn(high))];
      });
      const now = make('span'), area = make('div', { class: 'plot' }), { label } = quantities[name];
      const figure = make('figure', { class: 'track', 'data-name': name }, make('figcaption', {}, label, now), area);
      const move = plot(area, { lines: [{ name: 'along the text', slot: 2, points }], height: 110, title: label });
      figure.move = (token) => { move(token); now.textContent = `here ${readable(name, valueAt(found, token), found)}`; };
      return [figure];
    }));
    const where = `Layer ${view.layer}, ${view.head === null ? 'mean over heads' : `head ${view.head}`}`;
    const every = gates.map((name) => series(name, view.layer, view.head)?.every || 1).reduce((a, b) => Math.max(a, b), 1);
    get('gates-note').textContent = `${where}. Each line is the mean along the whole text, its shade the range${every > 1 ? `; values are means of ${every} tokens` : ''}. Where weights have gates of their own, their mean.`;
  }

  // Controls

  function showLegend() {
    const column = chosen(), { sorted, low, high, values } = column, { label, unit, meaning } = quantities[view.kind];
    const counts = new Array(STEPS).fill(0), n = STEPS, part = 100 / n;
    values.forEach((value) => { const rank = level(column, value); if (rank >= 0) counts[rank]++; });
    const most = Math.max(1, ...counts), edge = (k) => low * (high / low) ** (k / n);
    get('ramp').setAttribute('aria-label', `Colour scale of ${label} from ${number(low)} to ${number(high)} ${unit}, with the number of tokens of each colour`);
    get('ramp').replaceChildren(
      ...counts.map((c, k) => make('svg:rect', { class: 'count', x: `${k * part + 0.3}%`, y: 33 - (32 * c) / most, width: `${part - 0.6}%`, height: (32 * c) / most })),
      ...counts.map((_, k) => heat(make('svg:rect', { x: `${k * part}%`, y: 36, width: `${part + 0.1}%`, height: 12 }), k)),
      make('svg:rect', { class: 'box', x: 0, y: 36, width: '100%', height: 12 }),
      ...[[0, 'start', '≤ '], [8, 'middle', ''], [16, 'middle', ''], [24, 'end', '≥ ']].map(([k, anchor, sign]) => make('svg:text', { x: `${k * part}%`, y: 63, 'text-anchor': anchor }, sign + number(edge(k), 2))));
    get('meaning').textContent = meaning;
    const [half, tenth, hundredth] = [0.5, 0.9, 0.99].map((q) => number(quantile(sorted, q), 2));
    get('quantiles').textContent = sorted.length ? `${unit}, log scale; bars count tokens. Half lie below ${half}, one in ten above ${tenth}, one in a hundred above ${hundredth}.` : 'Nothing was measured.';
  }
  function redraw() {
          get('pick-layer').hidden = !layers.length;
    get('pick-head').hidden = !layers.length || !headsOf(view.layer).length;
    ink.setAttribute('aria-label', `The text, token by token, coloured by ${view.kind} surprise${view.kind === 'predictive' ? '' : `, layer ${view.layer}, ${view.head === null ? 'mean over heads' : `head ${view.head}`}`}`);
    blocks.forEach((block) => { if (block.spans) dress(block); });
    showLegend();
    showStrip();
    showGates();
    showMoments();
    mark(view.at);
    showView();
  }
  function choose(change) {
    Object.assign(view, change);
    if (view.head !== null && !headsOf(view.layer).includes(view.head)) view.head = null;
    const options = [make('option', { value: '' }, 'mean of all'), ...headsOf(view.layer).map((head) => make('option', { value: head }, String(head)))];
    get('head').replaceChildren(...options);
    get('head').value = view.head ?? '';
    redraw();
  }
  for (const kind of kinds) {
    const input = make('input', { type: 'radio', name: 'kind', value: kind });
    input.checked = kind === view.kind;
    input.addEventListener('change', () => choose({ kind }));
    get('kinds').append(make('label', {}, input, make('span', {}, kind)));
  }
  get('layer').append(...layers.map((layer) => make('option', { value: layer }, String(layer))));
  get('layer').addEventListener('change', (event) => choose({ layer: +event.target.value }));
  get('head').addEventListener('change', (event) => choose({ head: event.target.value === '' ? null : +event.target.value }));
  get('previous').addEventListener('click', () => jump(-1));
  get('next').addEventListener('click', () => jump(1));
  get('every').addEventListener('toggle', () => showToken(view.at));

  const press = (node, keys) => node.addEventListener('keydown', (event) => {
    const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act();
  });
  const step = (by) => go(view.at + by, { say: true });
  const line = (direction) => {
    const start = spanOf(units.of[view.at]).getBoundingClientRect();
    let best = units.of[view.at], row = null, near = Infinity;
    for (let u = best + direction; u >= 0 && u < units.count; u += direction) {
      const box = spanOf(u).getBoundingClientRect();
      if (Math.abs(box.top - start.top) < 4) continue;
      if (row === null) row = box.top;
      if (Math.abs(box.top - row) > 4) break;
      if (Math.abs(box.left - start.left) < near) { near = Math.abs(box.left - start.left); best = u; }
    }
    go(units.first[best], { say: true });
  };
  const edge = (direction) => {
    let u = units.of[view.at];
    const top = spanOf(u).getBoundingClientRect().top;
    while (u + direction >= 0 && u + direction < units.count && Math.abs(spanOf(u + direction).getBoundingClientRect().top - top) < 4) u += direction;
    go(units.first[u], { say: true });
  };
  const page = (direction) => {
    ink.scrollTop += 0.9 * direction * ink.clientHeight;
    paintNear();
    go(direction < 0 && !ink.scrollTop ? 0 : tokenAt(ink.scrollTop + ink.clientHeight / 2), { say: true });
  };
  press(ink, {
    ArrowRight: () => step(1), ArrowLeft: () => step(-1), ArrowDown: () => line(1), ArrowUp: () => line(-1),
    PageDown: () => page(1), PageUp: () => page(-1), Home: () => edge(-1), End: () => edge(1), n: () => jump(1), p: () => jump(-1),
  });
  const little = Math.max(1, Math.round(tokens / 200)), much = Math.max(1, Math.round(tokens / 20));
  const slide = (token) => go(token, { center: true });
  press(slider, {
    ArrowRight: () => slide(view.at + little), ArrowUp: () => slide(view.at + little),
    ArrowLeft: () => slide(view.at - little), ArrowDown: () => slide(view.at - little),
    PageUp: () => slide(view.at + much), PageDown: () => slide(view.at - much),
    Home: () => slide(0), End: () => slide(tokens - 1), n: () => jump(1), p: () => jump(-1),
  });
  const drag = (event) => {
    const box = sketch.getBoundingClientRect();
    slide(Math.floor((tokens * (event.clientX - box.left)) / box.width));
  };
  slider.addEventListener('pointerdown', (event) => { slider.setPointerCapture(event.pointerId); drag(event); });
  slider.addEventListener('pointermove', (event) => { if (event.buttons & 1) drag(event); });

  const under = (event) => event.target.closest('i')?.unit;
  ink.addEventListener('pointerover', (event) => { const unit = under(event); if (unit !== undefined) showToken(strongest(unit)); });
  ink.addEventListener('pointerleave', () => showToken(view.at));
  ink.addEventListener('click', (event) => { const unit = under(event); if (unit !== undefined) go(strongest(unit), { say: true }); });
  let waiting = false;
  const settle = () => {
    waiting = false;
    paintNear();
    const block = blocks[blockOf[units.of[view.at]]];
    if (!block.spans || !inView(spanOf(units.of[view.at]))) mark(tokenAt(ink.scrollTop + ink.clientHeight / 2));
    showView();
  };
  const later = () => { if (!waiting) { waiting = true; requestAnimationFrame(settle); } };
  ink.addEventListener('scroll', later, { passive: true });
  addEventListener('resize', () => { paintNear(); go(view.at); });
  addEventListener('beforeprint', () => blocks.forEach((block) => { if (!block.spans) paint(block); }));

  blocks.forEach(undress);
  ink.replaceChildren(...blocks.map((block) => block.node));
  get('status').hidden = true;
  get('explorer').hidden = false;
  get('memory').hidden = get('gates').hidden = !layers.length;
  get('every').hidden = !layers.length;
  get('no-memory').hidden = layers.length > 0;
  if (pair.length) buildAround();
  paintNear();
  choose({});
  document.documentElement.dataset.ready = 'yes';
}

document.addEventListener('DOMContentLoaded', async () => {
  try {
    if (!('DecompressionStream' in window)) throw new Error('this browser is too old to unpack it (it has no DecompressionStream)');
    explorer(await unpack(JSON.parse(get('data').textContent)));
    if (!CSS.supports('color', 'light-dark(oklch(calc(pow(1, 1)) 0 0), red)')) {
      get('status').hidden = false;
      get('status').textContent = 'This browser is too old to colour the text; every value is there as a number.';
    }
  } catch (error) {
    get('status').hidden = false;
    get('status').textContent = `The text cannot be shown: ${error.message}.`;
    throw error;
  }
});
