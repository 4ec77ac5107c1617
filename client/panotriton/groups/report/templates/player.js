// Plays a sequence there and back, and lights up on the map what each view sees.
const FRAME_MS = 180;

class Player {
  constructor(root) {
    this.root = root;
    this.strip = root.querySelector(".strip");
    this.screen = root.querySelector(".screen");
    this.range = root.querySelector("input");
    this.output = root.querySelector("output");
    this.playButton = root.querySelector(".play");
    this.spot = root.querySelector(".spot");
    this.edge = root.querySelector("path.now");
    this.camera = root.querySelector(".camera .now dd");
    this.index = 0;
    this.step = 1;
    this.timer = null;
    this.listen();
    this.show(0);
  }

  get views() {
    return [...this.strip.querySelectorAll("button")];
  }

  listen() {
    this.strip.addEventListener("click", (event) => {
      const view = event.target.closest("button");
      if (view) this.pick(this.views.indexOf(view));
    });
    this.range.addEventListener("input", () => this.pick(Number(this.range.value)));
    this.playButton.addEventListener("click", () => this.toggle());
    this.root.addEventListener("keydown", (event) => this.press(event));
  }

  press(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target === this.range) return;
    const last = this.views.length - 1;
    const to = { ArrowLeft: this.index - 1, ArrowRight: this.index + 1, Home: 0, End: last }[event.key];
    if (to !== undefined) this.pick(Math.min(Math.max(to, 0), last));
    else if (event.key === " " && event.target === this.root) this.toggle();
    else return;
    event.preventDefault();
  }

  pick(index) {
    this.pause();
    this.show(index);
  }

  show(index) {
    this.index = index;
    const view = this.views[index];
    const { name, area, outline, yaw, pitch, roll, vfov, xi } = view.dataset;
    const picture = view.querySelector("img");
    this.screen.src = picture.src;
    this.screen.alt = picture.alt;
    this.range.value = String(index);
    this.range.setAttribute("aria-valuetext", picture.alt);
    this.output.textContent = `${index + 1}/${this.views.length} ${name}`;
    this.spot.setAttribute("d", area);
    this.edge.setAttribute("d", outline);
    this.camera.textContent = `yaw ${yaw}, pitch ${pitch}, roll ${roll}, vfov ${vfov}, xi ${xi}`;
    for (const other of this.views) other.setAttribute("aria-current", String(other === view));
  }

  toggle() {
    if (this.timer === null) this.play();
    else this.pause();
  }

  play() {
    this.timer = setInterval(() => this.advance(), FRAME_MS);
    this.playButton.setAttribute("aria-label", "Pause");
    this.root.classList.add("playing");
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.playButton.setAttribute("aria-label", "Play");
    this.root.classList.remove("playing");
  }

  advance() {
    const last = this.views.length - 1;
    if (last === 0) return;
    if (this.index + this.step < 0 || this.index + this.step > last) this.step = -this.step;
    this.show(this.index + this.step);
  }
}

for (const root of document.querySelectorAll(".player")) new Player(root);
