(() => {
  'use strict';
  function chart(figure) {
    const plot = figure.querySelector('.plot');
    const svg = plot.querySelector('svg');
    const table = figure.querySelector('table');
    const names = [...table.querySelectorAll('thead th')].map((th) => th.textContent);
    const from = +svg.dataset.from, to = +svg.dataset.to, log = svg.dataset.log === '1';
    const place = (x) => (log ? Math.log(x / from) / Math.log(to / from) : (x - from) / (to - from));
    const rows = [...table.tBodies[0].rows].map((tr) => {
      const cells = [...tr.cells].map((c) => c.textContent);
      return { at: place(+cells[0]), x: (+cells[0]).toLocaleString('en'), cells: cells.slice(1) };
    });
    const rule = Object.assign(document.createElement('div'), { className: 'rule', hidden: true });
    const tip = Object.assign(document.createElement('div'), { className: 'tip', hidden: true });
    plot.append(rule, tip);
    svg.setAttribute('aria-label', svg.querySelector('title').textContent + '. ' + svg.querySelector('desc').textContent);
    svg.removeAttribute('aria-labelledby');
    svg.querySelector('title').remove();
    plot.tabIndex = 0;
    plot.setAttribute('role', 'group');
    plot.setAttribute('aria-label', 'Chart: left and right arrow keys step through the points');
    tip.setAttribute('role', 'status');
    let now = -1;
    const hide = () => { rule.hidden = tip.hidden = true; now = -1; };
    const show = (k) => {
      if (k === now) return;
      now = k;
      const row = rows[k], box = svg.getBoundingClientRect(), outer = plot.getBoundingClientRect();
      const left = box.left - outer.left + row.at * box.width;
      const head = document.createElement('b');
      head.textContent = `${names[0].replace(/ \(.*\)/, '')} ${row.x}`;
      tip.replaceChildren(head, ...row.cells.flatMap((cell, i) => {
        if (!cell) return [];
        const line = document.createElement('span');
        line.textContent = row.cells.length > 1 ? `${names[i + 1]}: ${cell}` : cell;
        return [line];
      }));
      rule.hidden = tip.hidden = false;
      rule.style.left = `${left}px`;
      const space = outer.width - tip.offsetWidth;
      tip.style.left = `${Math.max(0, Math.min(space, left > outer.width / 2 ? left - tip.offsetWidth - 14 : left + 14))}px`;
    };
    plot.addEventListener('pointermove', (event) => {
      const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width;
      let best = 0;
      rows.forEach((row, k) => { if (Math.abs(row.at - at) < Math.abs(rows[best].at - at)) best = k; });
      show(best);
    });
    plot.addEventListener('pointerleave', hide);
    plot.addEventListener('blur', hide);
    plot.addEventListener('keydown', (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === 'Escape') hide();
      if (!step) return;
      event.preventDefault();
      show(Math.max(0, Math.min(rows.length - 1, now + step)));
    });
  }

  function reader(box) {
    const ink = box.querySelector('#ink'), say = box.querySelector('#say'), readout = box.querySelector('.readout');
    const panels = [...box.querySelectorAll('.panel')];
    const letters = 'abcdefghijklmnopqrstuvwx';
    const signs = [];
    for (const char of ink.textContent) {
      if (signs.length && (/[\p{M}\u200d]/u.test(char) || signs.at(-1).endsWith('\u200d'))) signs[signs.length - 1] += char;
      else signs.push(char);
    }
    const layers = panels.map((panel) => {
      const codes = Uint8Array.from(atob(panel.dataset.codes), (c) => c.charCodeAt(0));
      const edges = panel.dataset.edges.split(',').map(Number);
      const sorted = codes.filter((c) => c !== 255).sort();
      return { codes, sorted, kind: panel.dataset.kind, unit: panel.dataset.unit,
        floor: +panel.dataset.floor, top: +panel.dataset.top,
        level: (code) => (code === 255 ? 'Z' : letters[edges.filter((e) => code >= e).length]) };
    });
    if (layers.some((layer) => layer.codes.length !== signs.length)) return;

    const spans = signs.map((sign) => Object.assign(document.createElement('i'), { textContent: sign }));
    let layer = layers[0], cursor = -1;
    const mark = { '\n': ' N', '\t': ' T' };
    const paint = () => spans.forEach((span, k) => {
      span.className = layer.level(layer.codes[k]) + (mark[signs[k]] || '') + (k === cursor ? ' C' : '');
    });
    const below = (code) => {
      let low = 0, high = layer.sorted.length;
      while (low < high) { const mid = (low + high) >> 1; if (layer.sorted[mid] < code) low = mid + 1; else high = mid; }
      return low;
    };
    const describe = (k) => {
      const code = layer.codes[k];
      if (code === 255) return 'not measured';
      const value = layer.floor * (layer.top / layer.floor) ** ((Math.max(code, 1) - 1) / 253);
      const shown = Number(value.toPrecision(2)).toLocaleString('en', { maximumSignificantDigits: 2 });
      const share = Math.floor((100 * below(code)) / layer.sorted.length);
      return `${code ? '≈' : 'under'} ${shown} ${layer.unit}, above ${share}\u00a0% of this page`;
    };
    const name = (sign) => ({ ' ': 'space', '\n': 'line break', '\t': 'tab' })[sign] || sign;
    const sample = readout.querySelector('.sign'), what = readout.querySelector('.what');
    const show = (k) => {
      sample.textContent = { ' ': '␣', '\n': '↵', '\t': '⇥' }[signs[k]] || signs[k];
      sample.style.background = layer.codes[k] === 255 ? 'none' : `var(--${layer.level(layer.codes[k])})`;
      what.textContent = describe(k);
    };
    const idle = () => {
      sample.textContent = '';
      sample.style.background = 'none';
      what.textContent = `Coloured by ${layer.kind} surprise. Point at a character to read its value.`;
    };
    const rest = () => (cursor < 0 ? idle() : show(cursor));
    const move = (k) => {
      if (cursor >= 0) spans[cursor].classList.remove('C');
      cursor = k;
      if (k < 0) { idle(); return; }
      spans[k].classList.add('C');
      show(k);
      say.textContent = `${name(signs[k])}: ${layer.kind} surprise ${describe(k)}`;
      const at = spans[k].getBoundingClientRect();
      if (at.top < 70 || at.bottom > innerHeight - 20) spans[k].scrollIntoView({ block: 'center' });
    };
    const line = (direction) => {
      const start = spans[cursor].offsetTop, left = spans[cursor].offsetLeft;
      let best = cursor, row = null;
      for (let k = cursor + direction; k >= 0 && k < spans.length; k += direction) {
        const top = spans[k].offsetTop;
        if (Math.abs(top - start) < 4) continue;
        if (row === null) row = top;
        if (Math.abs(top - row) > 4) break;
        if (best === cursor || Math.abs(spans[k].offsetLeft - left) < Math.abs(spans[best].offsetLeft - left)) best = k;
      }
      return best;
    };
    const edge = (direction) => {
      let k = cursor;
      while (spans[k + direction] && Math.abs(spans[k + direction].offsetTop - spans[cursor].offsetTop) < 4) k += direction;
      return k;
    };
    const sharp = (direction) => {
      const bar = layer.sorted[Math.floor(0.98 * (layer.sorted.length - 1))];
      for (let k = cursor + direction; k >= 0 && k < spans.length; k += direction) {
        if (layer.codes[k] !== 255 && layer.codes[k] >= bar) return k;
      }
      return cursor;
    };
    const keys = {
      ArrowRight: () => Math.min(spans.length - 1, cursor + 1), ArrowLeft: () => Math.max(0, cursor - 1),
      ArrowDown: () => line(1), ArrowUp: () => line(-1), Home: () => edge(-1), End: () => edge(1),
      n: () => sharp(1), p: () => sharp(-1), Escape: () => -1,
    };
    ink.addEventListener('keydown', (event) => {
      const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
      if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      move(cursor < 0 && event.key !== 'Escape' ? 0 : act());
    });
    const index = new Map(spans.map((span, k) => [span, k]));
    ink.addEventListener('pointerover', (event) => {
      const k = index.get(event.target);
      if (k !== undefined) show(k);
    });
    ink.addEventListener('pointerleave', rest);
    ink.addEventListener('click', (event) => {
      const k = index.get(event.target);
      if (k !== undefined) move(k);
    });
    const choose = (k) => {
      layer = layers[k];
      panels.forEach((panel, j) => { panel.hidden = j !== k; });
      paint();
      rest();
    };
    box.querySelectorAll('.kinds input').forEach((input) => input.addEventListener('change', () => choose(+input.value)));
    ink.replaceChildren(...spans);
    ink.tabIndex = 0;
    ink.setAttribute('role', 'application');
    ink.setAttribute('aria-label', 'The page, character by character');
    ink.setAttribute('aria-describedby', 'keys');
    box.querySelector('#keys').hidden = readout.hidden = false;
    box.querySelector('.kinds').hidden = layers.length < 2;
    choose(+(box.querySelector('.kinds input:checked') || { value: 0 }).value);
  }

  document.addEventListener('DOMContentLoaded', () => {
    document.querySelectorAll('.chart').forEach(chart);
    document.querySelectorAll('.reader').forEach(reader);
  });
})();
