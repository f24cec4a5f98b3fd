'use strict';

// What every page has: the theme, and the small tools of the other scripts.

const get = (id) => document.getElementById(id);
const clamp = (x, low, high) => Math.max(low, Math.min(high, x));
const whole = (value) => Math.round(value).toLocaleString('en');

function make(name, attributes = {}, ...children) {
  const node = document.createElementNS(name.startsWith('svg:') ? 'http://www.w3.org/2000/svg' : 'http://www.w3.org/1999/xhtml', name.replace('svg:', ''));
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function number(value, digits = 3) {
  if (Number.isNaN(value)) return 'not measured';
  if (value !== 0 && Math.abs(value) < 1e-4) {
    const [head, power] = value.toExponential(digits - 1).split('e');
    return `${+head} × 10${[...power.replace('+', '')].map((c) => (c === '-' ? '⁻' : '⁰¹²³⁴⁵⁶⁷⁸⁹'[c])).join('')}`;
  }
  return value.toLocaleString('en', { maximumSignificantDigits: digits });
}

function theme() {
  const root = document.documentElement, button = get('theme'), media = matchMedia('(prefers-color-scheme: dark)');
  const store = { get: () => { try { return localStorage.getItem('miras-theme'); } catch { return null; } },
    set: (v) => { try { localStorage.setItem('miras-theme', v); } catch { /* a private window keeps nothing */ } } };
  const saved = store.get();
  if (saved === 'light' || saved === 'dark') root.dataset.theme = saved;
  const current = () => root.dataset.theme || (media.matches ? 'dark' : 'light');
  const label = () => { button.textContent = current() === 'dark' ? 'Light theme' : 'Dark theme'; };
  button.hidden = false;
  button.addEventListener('click', () => {
    root.dataset.theme = current() === 'dark' ? 'light' : 'dark';
    store.set(root.dataset.theme);
    label();
  });
  media.addEventListener('change', label);
  label();
}
document.addEventListener('DOMContentLoaded', theme);
