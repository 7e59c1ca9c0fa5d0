"use strict";
// The sample browser and the choice of theme. Every text goes into the page by textContent.
(() => {
  const byId = (id) => document.getElementById(id);
  const make = (tag, className, words) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (words !== undefined) node.textContent = words;
    return node;
  };

  // --- theme and print ---------------------------------------------------------------------------
  const theme = byId("theme");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const node of closed) node.open = true;
  });
  addEventListener("afterprint", () => closed.forEach((node) => (node.open = false)));

  // --- data --------------------------------------------------------------------------------------
  const browser = byId("browser");
  if (!browser) return;
  const parsed = new Map();
  const block = (id) => {
    if (!parsed.has(id)) parsed.set(id, JSON.parse(byId(id).textContent));
    return parsed.get(id);
  };
  const PICTURES_A_BLOCK = 100;
  const picture = (place) => {
    const own = block(`pictures-${Math.floor(place / PICTURES_A_BLOCK)}`);
    const image = make("img");
    image.src = `data:image/webp;base64,${own[place % PICTURES_A_BLOCK]}`;
    image.decoding = "async";
    return image;
  };

  const PAGE = 60;
  const state = { task: 0, system: 0, order: "up", filter: "all", words: "", rows: [], at: 0, drawn: 0 };
  let data = null;
  const captions = () => data.kind === "captions";

  // An answer: [text, score, probabilities of the options, what was read from it]; a choice's score
  // is 1 where it is right. Captions have the first two alone, or in the last place the objects that
  // they name and the picture does not show; other replies have the first three.
  const choices = () => data.kind === "choices";
  const score = (answer) => answer[1];
  const figure = (value) => (data.scale * value).toFixed(data.scale === 100 ? 1 : 3);
  const gold = (row) => row.t.charCodeAt(0) - 65;
  const top = (odds) => odds.indexOf(Math.max(...odds));
  const compared = () => state.system > 0;
  const difference = (row) => {
    const [own, other] = [score(row.a[state.system]), compared() ? score(row.a[0]) : 0];
    return own === null || other === null ? 0 : data.sign * (own - other);
  };
  // Equal answers are told apart by the probability of the right option.
  const finer = (row) => {
    const [own, other] = [row.a[state.system][2], row.a[0][2]];
    if (!own || row.t.length !== 1) return 0;
    return own[gold(row)] - (compared() && other ? other[gold(row)] : 0);
  };
  const failed = (row) => {
    const answer = row.a[state.system];
    return choices() ? answer[3] === null : answer[0].trim() === "";
  };
  const confidentlyWrong = (row) => {
    const odds = row.a[state.system][2];
    if (!odds || row.t.length !== 1) return false;
    const place = top(odds);
    return place !== gold(row) && odds[place] >= data.confident;
  };
  const invented = (answer) => (captions() && answer[3]) || [];
  // Key, name, test, and whether the task has such samples at all.
  const FILTERS = [
    ["all", "all", () => true, () => true],
    ["win", "better", (row) => difference(row) > 0, compared],
    ["loss", "worse", (row) => difference(row) < 0, compared],
    ["failure", () => (captions() ? "no words" : "parse failures"), failed, () => true],
    ["confident", "confidently wrong", confidentlyWrong, () => data.rows.some((row) => row.a[state.system][2])],
    [
      "invented",
      "hallucinated",
      (row) => invented(row.a[state.system]).length > 0,
      () => captions() && data.rows.some((row) => row.a[state.system][3]),
    ],
  ];

  const haystack = new WeakMap();
  const found = (row, words) => {
    if (!haystack.has(row)) {
      const parts = [row.id, data.prompts[row.q], ...(row.g || []), ...(row.r || []), ...(row.o || [])];
      haystack.set(row, [...parts, ...row.a.map((answer) => answer[0])].join("\n").toLowerCase());
    }
    const text = haystack.get(row);
    return words.every((word) => text.includes(word));
  };

  // --- controls ----------------------------------------------------------------------------------
  const [list, detail, filters] = ["list", "detail", "filters"].map(byId);
  const buttons = new Map();
  for (const [key] of FILTERS) {
    const button = make("button");
    button.type = "button";
    button.dataset.filter = key;
    button.addEventListener("click", () => {
      state.filter = key;
      refresh();
    });
    filters.append(button);
    buttons.set(key, button);
  }

  const chooseTask = (place) => {
    state.task = place;
    data = block(`samples-${place}`);
    const system = byId("system");
    const before = system.value;
    system.replaceChildren();
    data.systems.forEach((name, number) => {
      const option = make("option", "", number === 0 && data.systems.length > 1 ? `${name} (baseline)` : name);
      option.value = name;
      system.append(option);
    });
    const kept = data.systems.indexOf(before);
    state.system = kept > 0 ? kept : Math.min(1, data.systems.length - 1);
    system.selectedIndex = state.system;
    refresh();
  };

  const refresh = () => {
    const words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
    const searched = words.length ? data.rows.filter((row) => found(row, words)) : data.rows;
    for (const [key, name, test, applies] of FILTERS) {
      const button = buttons.get(key);
      button.hidden = !applies();
      if (button.hidden && state.filter === key) state.filter = "all";
      const count = key === "all" ? searched.length : searched.filter(test).length;
      button.textContent = `${typeof name === "string" ? name : name()} ${count.toLocaleString("en")}`;
    }
    for (const [key, button] of buttons) button.setAttribute("aria-pressed", String(state.filter === key));
    const test = FILTERS.find(([key]) => key === state.filter)[2];
    state.rows = searched.filter(test);
    if (state.order !== "id") {
      const way = state.order === "up" ? -1 : 1;
      const keys = new Map(state.rows.map((row) => [row, [difference(row), finer(row)]]));
      state.rows.sort((one, other) => {
        const [a, b] = [keys.get(one), keys.get(other)];
        return way * (a[0] - b[0] || a[1] - b[1]);
      });
    }
    const what = compared()
      ? `, ${data.systems[state.system]} against ${data.systems[0]}`
      : `, ${data.systems[state.system]}`;
    byId("count").textContent =
      `${state.rows.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} samples${what}`;
    list.replaceChildren();
    state.drawn = 0;
    drawMore();
    list.scrollTop = 0;
    select(0);
  };

  // --- the list ----------------------------------------------------------------------------------
  const gainOf = (row) => {
    const gain = make("span", "gain");
    if (!compared()) {
      const value = score(row.a[state.system]);
      gain.textContent = value === null ? "" : choices() ? (value ? "✓" : "✗") : figure(value);
      return gain;
    }
    const value = difference(row);
    gain.classList.add(value > 0 ? "better" : value < 0 ? "worse" : "muted");
    const sign = value > 0 ? "▲" : value < 0 ? "▼" : "=";
    const change = data.sign * value;
    gain.textContent = !choices() && value ? `${sign} ${change > 0 ? "+" : "−"}${figure(Math.abs(change))}` : sign;
    return gain;
  };

  const entry = (row, place) => {
    const item = make("li");
    item.id = `sample-${place}`;
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", "false");
    if (row.p && row.p.length) {
      const image = picture(row.p[0]);
      image.alt = "";
      item.append(image);
    } else item.append(make("span", "none"));
    const answer = row.a[state.system][0] || "(no words)";
    const words = make("span", "words", captions() ? answer : `${answer} — ${data.prompts[row.q]}`);
    words.dir = "auto";
    item.append(words, gainOf(row));
    item.addEventListener("click", () => select(place));
    return item;
  };

  const drawMore = () => {
    const end = Math.min(state.drawn + PAGE, state.rows.length);
    const part = document.createDocumentFragment();
    for (; state.drawn < end; state.drawn += 1) part.append(entry(state.rows[state.drawn], state.drawn));
    list.append(part);
  };
  list.addEventListener("scroll", () => {
    if (list.scrollTop + list.clientHeight > list.scrollHeight - 300) drawMore();
  });

  const select = (place) => {
    for (const item of list.querySelectorAll('[aria-selected="true"]')) item.setAttribute("aria-selected", "false");
    if (!state.rows.length) {
      list.removeAttribute("aria-activedescendant");
      detail.replaceChildren(make("p", "muted", "No sample is of this kind."));
      return;
    }
    state.at = Math.max(0, Math.min(place, state.rows.length - 1));
    while (state.drawn <= state.at) drawMore();
    const item = byId(`sample-${state.at}`);
    item.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", item.id);
    const [above, below] = [item.offsetTop - list.offsetTop, item.offsetTop - list.offsetTop + item.offsetHeight];
    if (above < list.scrollTop) list.scrollTop = above;
    if (below > list.scrollTop + list.clientHeight) list.scrollTop = below - list.clientHeight;
    show(state.rows[state.at]);
  };

  // --- one sample --------------------------------------------------------------------------------
  const show = (row) => {
    const parts = [make("h3", "", `${data.task}: ${row.id}`)];
    const facts = [...(row.g || [])];
    if (row.s) facts.push(`options rotated by ${row.s}`);
    if (facts.length) parts.push(make("p", "muted", facts.join(" · ")));
    const [top, said] = [make("div", "top"), make("div", "said")];
    if (row.p && row.p.length) {
      const pictures = make("div", "pictures");
      row.p.forEach((place, number) => {
        const image = picture(place);
        image.alt = row.p.length > 1 ? `image ${number + 1} of the sample` : "the sample's image";
        pictures.append(image);
      });
      top.append(pictures);
    }
    top.append(said);
    parts.push(top);
    const prompt = make("pre", "", data.prompts[row.q]);
    prompt.dir = "auto";
    said.append(make("h4", "", captions() ? "Prompt" : "Question"), prompt);
    if (captions()) {
      said.append(make("h4", "", "References"));
      const references = make("ul");
      for (const reference of row.r) {
        const item = make("li", "", reference);
        item.dir = "auto";
        references.append(item);
      }
      said.append(references);
    } else said.append(make("h4", "", "Right answer"), make("pre", "", goldText(row)));
    const answers = make("div", "answers");
    row.a.forEach((answer, number) => answers.append(answerOf(row, answer, number)));
    parts.push(make("h4", "", "Answers"), answers);
    detail.replaceChildren(...parts);
  };

  const goldText = (row) => {
    const option = row.t.length === 1 ? row.o[gold(row)] : undefined;
    return option === undefined ? row.t : `${row.t}. ${option}`;
  };

  const answerOf = (row, answer, number) => {
    const box = make("div", `answer s${number % 8}`);
    const line = make("div");
    line.append(make("span", "who", data.systems[number]));
    const own = score(answer);
    if (!choices() && own !== null) line.append(make("span", "score muted", `${data.metric} ${figure(own)}`));
    if (choices()) {
      const read = answer[3] === null ? "could not be parsed" : `read as ${answer[3]}`;
      line.append(make("span", `score ${own ? "better" : "worse"}`, `${own ? "✓ right" : "✗ wrong"}, ${read}`));
    }
    if (invented(answer).length) {
      line.append(make("span", "score worse", `not in the picture: ${invented(answer).join(", ")}`));
    }
    const words = make("pre", "", answer[0] || "(no words)");
    words.dir = "auto";
    box.append(line, words);
    if (answer[2]) box.append(oddsOf(row, answer[2]));
    return box;
  };

  const oddsOf = (row, odds) => {
    const grid = make("div", "odds");
    odds.forEach((share, place) => {
      const right = String.fromCharCode(65 + place) === row.t;
      const name = make("span", right ? "right" : "", `${String.fromCharCode(65 + place)}. ${row.o[place]}`);
      name.dir = "auto";
      const track = make("span", "track");
      const fill = make("span", "fill");
      fill.style.display = "block";
      fill.style.width = `${100 * share}%`;
      track.append(fill);
      grid.append(name, track, make("span", "", `${(100 * share).toFixed(1)} %${right ? " ✓" : ""}`));
    });
    return grid;
  };

  // --- keys --------------------------------------------------------------------------------------
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("task").addEventListener("change", (event) => chooseTask(Number(event.target.value)));
  byId("system").addEventListener("change", (event) => {
    state.system = event.target.selectedIndex;
    refresh();
  });
  byId("order").addEventListener("change", (event) => {
    state.order = event.target.value;
    refresh();
  });
  const search = byId("search");
  let waiting = 0;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      state.words = search.value;
      refresh();
    }, 120);
  });
  const MOVES = { j: 1, k: -1, ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, select, textarea");
    if (typing) {
      if (event.target === search && (event.key === "Escape" || event.key === "Enter")) {
        // Escape would empty the field; what was found is to be walked through.
        event.preventDefault();
        list.focus();
      }
      return;
    }
    if (event.key === "/") {
      event.preventDefault();
      search.focus();
    } else if (event.key in MOVES && (event.target === list || event.key === "j" || event.key === "k")) {
      event.preventDefault();
      select(state.at + MOVES[event.key]);
    }
  });

  browser.hidden = false;
  chooseTask(0);
})();
