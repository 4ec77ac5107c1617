// One run at a time: two files go up as one body, events come down line by line, each draws its part.
const INTERVALS = 8;
const KINDS = ["waiting", "working", "kept", "dropped"];
const find = (selector, root = document) => root.querySelector(selector);
const form = find("#start");
const cancel = find("#cancel");
const drops = [...form.querySelectorAll(".drop")];
const files = [null, null];
const urls = [null, null]; // of the files, to show them without sending them anywhere

function stamp(id) {
  return find(`template#${id}`).content.firstElementChild.cloneNode(true);
}

function complain(message) {
  const trouble = find("#trouble");
  trouble.textContent = message;
  trouble.hidden = !message;
}

function choose(index, file) {
  if (!file) return;
  if (urls[index]) URL.revokeObjectURL(urls[index]);
  files[index] = file;
  urls[index] = URL.createObjectURL(file);
  const preview = find("img", drops[index]);
  preview.onerror = () => { preview.hidden = true; };
  preview.hidden = false;
  preview.src = urls[index];
  find(".file", drops[index]).textContent = file.name;
  complain("");
}

drops.forEach((drop, index) => {
  find("input", drop).addEventListener("change", (event) => choose(index, event.target.files[0]));
  drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const [file, other] = event.dataTransfer.files;
    choose(index, file);
    choose(1 - index, other);
  });
});

// The views of one sequence, which come in any order: the player grows with them.
class Growing {
  constructor(card, panorama, interval, ends, cameras) {
    this.root = stamp("player");
    const label = `panorama ${panorama}, interval ${interval}`;
    this.root.setAttribute("aria-label", `Sequence of ${label}. Arrow keys step, space plays.`);
    this.strip = find(".strip", this.root);
    find("svg", this.root).setAttribute("aria-label", `Where the cameras of ${label} look`);
    find("image", this.root).setAttribute("href", urls[panorama - 1]);
    ["left", "right"].forEach((side) => find(`path.${side}`, this.root).setAttribute("d", cameras[side].outline));
    this.put(0, "left", ends[0], cameras.left);
    this.put(Infinity, "right", ends[1], cameras.right);
    card.append(this.root);
    this.player = new Player(this.root);
    this.update();
  }

  put(place, name, picture, camera) {
    const item = document.createElement("li");
    const button = document.createElement("button");
    const image = new Image();
    button.type = "button";
    button.tabIndex = -1;
    Object.assign(button.dataset, camera, { name });
    image.src = picture;
    image.alt = name;
    button.append(image);
    item.append(button);
    item.place = place;
    this.strip.insertBefore(item, [...this.strip.children].find((other) => other.place > place) ?? null);
  }

  add(index, picture, camera) {
    const shown = find('[aria-current="true"]', this.strip);
    this.put(index, `in-between ${index}`, picture, camera);
    find(".betweens", this.root).append(outline("between", camera));
    this.update();
    this.player.show(this.player.views.indexOf(shown));
  }

  update() {
    find("input", this.root).max = this.strip.children.length - 1;
  }
}

function outline(kind, camera) {
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("class", kind);
  path.setAttribute("d", camera.outline);
  return path;
}

class Run {
  constructor(threshold) {
    this.threshold = threshold;
    this.looks = new Map();
    this.pairs = new Map();
    this.sequences = new Map();
    this.began = performance.now();
    this.ended = false;
    this.clear();
  }

  clear() {
    find("#run").hidden = find("#progress").hidden = false;
    find("#threshold").textContent = this.threshold.toFixed(2);
    find(".scores").style.setProperty("--threshold", `${100 * this.threshold}%`);
    for (const old of document.querySelectorAll("#maps path.between, .interval .pair")) old.remove();
    for (const path of document.querySelectorAll("#maps g path")) path.removeAttribute("d");
    for (const bar of document.querySelectorAll(".scores .bar")) this.fill(bar, 0, "");
    for (const text of document.querySelectorAll(".interval .reason")) text.textContent = "";
    for (const quote of document.querySelectorAll(".interval blockquote")) quote.hidden = true;
    document.querySelectorAll("#maps image").forEach((image, i) => image.setAttribute("href", urls[i]));
    for (let interval = 1; interval <= INTERVALS; interval++) this.mark(interval, "waiting");
    this.progress(0, 1, "sending the panoramas");
  }

  card(interval) {
    return find(`#interval-${interval}`);
  }

  mark(interval, kind) {
    for (const part of document.querySelectorAll(`[data-interval="${interval}"]`)) {
      part.classList.remove(...KINDS);
      part.classList.add(kind);
      const badge = find(".badge", part);
      if (badge) badge.textContent = kind;
    }
  }

  fill(bar, share, words) {
    bar.classList.toggle("none", share === null);
    find("i", bar).style.width = `${100 * (share ?? 0)}%`;
    find("b", bar).textContent = words;
  }

  progress(done, total, state) {
    const bar = find("progress");
    bar.max = total;
    bar.value = done;
    const seconds = ((performance.now() - this.began) / 1000).toFixed(0);
    find("#state").textContent = state;
    find("#count").textContent = `${done} of ${total} images, ${seconds} s`;
  }

  take(event) {
    const { event: kind, ...content } = event;
    if (kind !== "error") this.progress(event.done, event.total, "working");
    this[kind](content);
  }

  accepted() {
    find("#state").textContent = "cropping pairs";
  }

  cameras({ cameras }) {
    this.looks = new Map(cameras.map((pair) => [`${pair.panorama}-${pair.interval}`, pair]));
    const maps = document.querySelectorAll("#maps svg");
    for (const { panorama, interval, left, right } of cameras) {
      const group = find(`[data-interval="${interval}"]`, maps[panorama - 1]);
      find(".left", group).setAttribute("d", left.outline);
      find(".right", group).setAttribute("d", right.outline);
    }
  }

  pair({ panorama, interval, before, after, ends, width, height }) {
    const part = stamp("pair");
    const label = `panorama ${panorama}, interval ${interval}`;
    const slider = find("img-comparison-slider", part);
    const [first, second] = part.querySelectorAll("img");
    first.src = before;
    first.alt = `Bicubic: ${label}`;
    second.src = after;
    second.alt = `Super-resolved: ${label}`;
    slider.style.setProperty("--natural", `${width}px`);
    slider.setAttribute("aria-label", `Bicubic against super-resolved: ${label}`);
    find(".whose", part).textContent = `Panorama ${panorama}`;
    find(".whose", part).classList.add(`p${panorama}`);
    find(".what", part).textContent = `${width}\u00a0×\u00a0${height}\u00a0px`;
    this.card(interval).append(part);
    announceSlider(slider);
    enableZoom(find(".zoom", part));
    this.pairs.set(`${panorama}-${interval}`, { part, ends });
    this.mark(interval, "working");
  }

  scored({ panorama, interval, score, parts }) {
    const words = score === null ? "no score" : score.toFixed(2);
    this.fill(find(`tr[data-interval="${interval}"] .bar.p${panorama}`), score, words);
    const details = Object.entries(parts).map(([name, value]) => `${name} ${value?.toFixed(2) ?? "–"}`);
    const { part } = this.pairs.get(`${panorama}-${interval}`);
    find(".scored", part).textContent = `${words} (${details.join(", ")})`;
  }

  kept({ interval }) {
    this.mark(interval, "kept");
    for (const panorama of [1, 2]) {
      const key = `${panorama}-${interval}`;
      const { part, ends } = this.pairs.get(key);
      const sequence = new Growing(part, panorama, interval, ends, this.looks.get(key));
      this.sequences.set(key, sequence);
    }
  }

  dropped({ interval, reason }) {
    this.mark(interval, "dropped");
    find(".reason", this.card(interval)).textContent = `Dropped: ${reason}.`;
  }

  view({ panorama, interval, index, picture, camera }) {
    this.sequences.get(`${panorama}-${interval}`).add(index, picture, camera);
    find(`[data-interval="${interval}"]`, document.querySelectorAll("#maps svg")[panorama - 1])
      .prepend(outline("between", camera));
  }

  described({ interval, text, error }) {
    const quote = find("blockquote", this.card(interval));
    quote.textContent = text || `No description: ${error}`;
    quote.hidden = false;
  }

  done({ kept }) {
    this.ended = true;
    find("#state").textContent = `done: ${kept.length} of ${INTERVALS} intervals kept`;
  }

  error({ message }) {
    throw new Error(message);
  }
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let read = await reader.read(); !read.done; read = await reader.read()) {
    const parts = (rest + read.value).split("\n");
    rest = parts.pop();
    yield* parts;
  }
}

async function send(options, signal) {
  const query = new URLSearchParams({ ...options, first_bytes: files[0].size });
  const headers = { "Content-Type": "application/octet-stream" };
  const body = new Blob(files);
  const response = await fetch(`runs?${query}`, { method: "POST", headers, body, signal });
  if (!response.ok) throw new Error((await response.json()).error);
  return response.body;
}

function check() {
  if (!files[0] || !files[1]) return "Choose two panoramas first.";
  const size = files[0].size + files[1].size;
  const most = Number(form.dataset.maxBytes);
  const [has, may] = [size, most].map((bytes) => (bytes / 1e6).toFixed(1));
  return size > most ? `The two files have ${has} MB; at most ${may} MB are taken: choose smaller ones.` : "";
}

async function start(options) {
  const abort = new AbortController();
  cancel.onclick = () => abort.abort();
  const run = new Run(Number(options.threshold));
  try {
    for await (const line of lines(await send(options, abort.signal))) run.take(JSON.parse(line));
    if (!run.ended) throw new Error("The connection ended before the run did: is the page's server still there?");
  } catch (error) {
    find("#state").textContent = abort.signal.aborted ? "cancelled" : "failed";
    if (!abort.signal.aborted) complain(error.message);
  }
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const trouble = check();
  complain(trouble);
  if (trouble) return;
  const { seed, threshold, interpolations } = form.elements;
  const go = find(".go");
  go.hidden = true;
  cancel.hidden = false;
  await start({ seed: seed.value, threshold: threshold.value, interpolations: interpolations.value });
  cancel.hidden = true;
  go.hidden = false;
});
