(() => {
  'use strict';
  const root = document.documentElement;
  const store = { get: () => { try { return localStorage.getItem('miras-theme'); } catch { return null; } },
    set: (v) => { try { localStorage.setItem('miras-theme', v); } catch { /* a private window keeps nothing */ } } };
  const saved = store.get();
  if (saved === 'light' || saved === 'dark') root.dataset.theme = saved;

  document.addEventListener('DOMContentLoaded', () => {
    const button = document.getElementById('theme');
    const media = matchMedia('(prefers-color-scheme: dark)');
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
  });
})();
