// What the book's pages do beside what their generator gives them: search, and where the search box and the contents of a page stand.
// It comes before the generator's own script.

// Pages opened from the disk may not fetch: there the search index comes as a script.
if (location.protocol === 'file:') window.fetch = (plain => (url, ...rest) => !String(url).endsWith('search.json') ? plain(url, ...rest) :
  new Promise((done, fail) => {
    const tag = document.createElement('script');
    tag.src = String(url).replace(/search\.json$/, 'site_libs/search-index.js');
    tag.onload = () => done(new Response(JSON.stringify(window.searchIndex)));
    tag.onerror = fail;
    document.head.append(tag);
  }))(window.fetch);

// Search. A name typed exactly finds its entry; a topic finds the chapter that is about it, then its sections, and helper functions after them.
// Where no entry holds all words, the generator's tolerant search is asked.
(() => {
  const Tolerant = window.Fuse;
  if (!Tolerant) return;
  const count = (text, word) => text.split(word).length - 1;
  class BookSearch {
    constructor(index, options) {
      this.options = options;
      this.index = index;
      this.pages = new Map();
      this.low = index.map(e => {
        const href = e.href.toLowerCase(), page = href.split('#')[0];
        const o = {page, name: page.split('/').pop().replace('.html', '').replace(/_/g, ' '), title: e.title.toLowerCase(), section: (e.section || '').toLowerCase(), text: e.text.toLowerCase()};
        this.pages.set(page, (this.pages.get(page) || '') + ' ' + o.section + ' ' + o.text);
        return o;
      });
    }
    score(o, words, query) {
      const helper = /^[\w.]+$/.test(o.section) && !/^(the|a|an)$/.test(o.section); // a symbol's entry, not a heading in words
      let sum = !o.section && o.title === query ? 100 : !helper ? 0 : o.section === query ? 200 : o.section.split('.').pop() === query ? 150 : 0;
      for (const w of words) {
        const whole = o.section ? o.section + ' ' + o.text : this.pages.get(o.page) + ' ' + o.title + ' ' + o.name;
        const n = count(whole, w);
        if (!n) return 0;
        if (o.section) sum += (o.section.includes(w) ? (helper ? 8 : 20) : 0) + Math.min(n, 6);
        else sum += (o.title.includes(w) ? 40 : 0) + (o.name.includes(w) ? 30 : 0) + 9 * Math.log(1 + n);
      }
      return /^(api|index)\.html/.test(o.page) ? sum / 4 : sum;
    }
    search(query, {limit = 20} = {}) {
      const q = query.toLowerCase().trim(), words = q.split(/\s+/);
      const found = this.low.map((o, i) => [this.score(o, words, q), i]).filter(([s]) => s > 0).sort((a, b) => b[0] - a[0] || a[1] - b[1]);
      if (found.length) return found.slice(0, limit).map(([, i]) => ({item: this.index[i]}));
      return new Tolerant(this.index, this.options).search(query, {limit});
    }
  }
  window.Fuse = BookSearch;
})();

// Where the window has no room for a column of its own, the contents of a page stand in the sidebar below the page's name;
// on a phone the search box stands in the bar instead of in the menu.
(() => {
  const toc = document.querySelector('#TOC'), home = toc && toc.parentElement;
  const here = document.querySelector('#quarto-sidebar .sidebar-link.active, #quarto-sidebar a.active');
  const search = document.querySelector('#navbarCollapse .quarto-navbar-tools'), menu = document.querySelector('#navbarCollapse');
  const toggler = document.querySelector('.navbar-toggler');
  const place = () => {
    if (toc && here) {
      const item = here.closest('li') || here.parentElement;
      if (window.innerWidth < 1500 && window.innerWidth > 991) { if (toc.parentElement !== item) item.append(toc); }
      else if (toc.parentElement !== home) home.prepend(toc);
    }
    if (search && toggler) {
      if (window.innerWidth < 992) { if (search.parentElement === menu) toggler.before(search); }
      else if (search.parentElement !== menu) menu.append(search);
    }
  };
  place();
  window.addEventListener('resize', place);
  const side = document.querySelector('#quarto-sidebar');
  if (here && side) side.scrollTop = Math.max(0, here.getBoundingClientRect().top - side.getBoundingClientRect().top - 120);
})();
