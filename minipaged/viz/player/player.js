// <trace-player src="traces/two_requests.json"></trace-player>: plays a recorded trace. Play, pause, step, back, speed,
// a slider; arrow keys, Page Up and Page Down, Home, End and the space bar. What stands inside the element (a picture,
// a link) is what a page without scripts shows.
//
// A film may have marks: moments that matter, each with a caption. It opens at the middle one, like a poster, and play
// stays there for longer; the first press of play begins at the beginning.
//
// The element keeps one number, the frame. The films know what a frame holds and the drawings show it, so going
// back is not undoing: it is showing an earlier frame.

import { drawBlocks, drawLinks } from "./blocks.js";
import { element } from "./dom.js";
import { BlockFilm } from "./film.js";
import { FragmentationFilm, drawFragmentation } from "./fragmentation.js";

const SPEEDS = { slow: 1600, normal: 800, fast: 250 }; // milliseconds a frame
const AT_A_MARK = 5; // times as long
const PATHS = {
  first: "M6 5v14M19 5 9 12l10 7z",
  stepBack: "M12 6 4 12l8 6zM20 6l-8 6 8 6z",
  back: "M17 5 7 12l10 7z",
  play: "M7 4v16l13-8z",
  pause: "M7 4h3v16H7zM14 4h3v16h-3z",
  next: "M7 5l10 7-10 7z",
  stepNext: "M12 6l8 6-8 6zM4 6l8 6-8 6z",
};

class TracePlayer extends HTMLElement {
  connectedCallback() {
    if (!this.film && this.hasAttribute("src")) this.open(this.getAttribute("src"));
  }

  async open(url) {
    try {
      const answer = await fetch(url);
      if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
      this.load(await answer.json());
    } catch (error) {
      this.append(element("p", { role: "alert" }, `The trace could not be loaded: ${error.message}`));
    }
  }

  disconnectedCallback() {
    this.pause();
    this.resizing?.disconnect();
  }

  // Show a document. `frame` is where it opens: a number, -1 for the last one; else at the middle mark.
  load(document, frame = null) {
    this.pause();
    const blocks = document.schema !== "minipaged.site.fragmentation";
    this.film = blocks ? new BlockFilm(document) : new FragmentationFilm(document);
    this.draw = blocks ? drawBlocks : drawFragmentation;
    this.#build(document);
    this.stage.style.minHeight = "";
    this.draw(this.film, this.film.tallest(), this.stage);
    this.stage.style.minHeight = `${this.stage.offsetHeight}px`;
    const [middle] = this.film.marks[this.film.marks.length >> 1] ?? [0];
    this.go(frame === null ? middle : frame < 0 ? this.film.length + frame : frame);
    this.isPoster = true;
    this.resizing?.disconnect();
    this.resizing = new ResizeObserver(() => blocks && drawLinks(this.film, this.frame, this.stage));
    this.resizing.observe(this.stage);
  }

  // A live film grows. The player follows while it shows the last frame and is not held.
  append(message, hold = false) {
    const follow = !hold && !this.timer && this.frame === this.film.length - 1;
    const gone = this.film.append(message);
    this.slider.max = this.film.length - 1;
    this.said.setAttribute("aria-live", follow ? "off" : "polite");
    this.frame = follow ? this.film.length - 1 : Math.max(0, this.frame - gone);
    if (follow) this.drawing ??= requestAnimationFrame(() => { this.drawing = null; this.go(this.frame); });
    else this.count.textContent = `${this.frame} / ${this.film.length - 1}`;
  }

  go(frame) {
    this.isPoster = false;
    this.frame = Math.max(0, Math.min(this.film.length - 1, frame));
    this.draw(this.film, this.frame, this.stage);
    const words = this.film.words(this.frame);
    this.said.textContent = words;
    this.slider.value = this.frame;
    this.slider.setAttribute("aria-valuetext", `${this.frame} of ${this.film.length - 1}: ${words}`);
    this.count.textContent = `${this.frame} / ${this.film.length - 1}`;
    this.moment.replaceChildren(...this.film.sentences(this.frame).map((line) => element("li", {}, line)));
    this.#showMark();
    const [atStart, atEnd] = [this.frame === 0, this.frame === this.film.length - 1];
    for (const name of ["first", "stepBack", "back"]) this.buttons[name].setAttribute("aria-disabled", atStart);
    for (const name of ["next", "stepNext"]) this.buttons[name].setAttribute("aria-disabled", atEnd);
    if (atEnd) this.pause();
  }

  // To the first frame of the step before, or to the last frame of the next one: a whole step of the engine.
  goStep(direction) {
    let frame = this.frame + direction;
    const last = this.film.length - 1;
    if (direction > 0) {
      while (frame < last && this.film.step(frame + 1) === this.film.step(frame)) frame++;
    } else {
      while (frame > 0 && this.film.step(frame) === this.film.step(this.frame)) frame--;
    }
    this.go(frame);
  }

  // The caption of the last mark that was passed: strong at its own moment.
  #showMark() {
    const { marks } = this.film;
    const last = marks.findLastIndex(([frame]) => frame <= this.frame);
    this.caption.textContent = last < 0 ? "" : marks[last][1];
    this.caption.classList.toggle("tp-now", marks[last]?.[0] === this.frame);
    this.markers.forEach((marker, number) => marker.setAttribute("aria-pressed", marks[number][0] === this.frame));
  }

  play() {
    if (this.isPoster || this.frame === this.film.length - 1) this.go(0);
    this.said.setAttribute("aria-live", "off"); // a reader would be told faster than anyone can listen
    this.#wait();
    this.#showPlaying(true);
  }

  // One frame after the other; a mark stays for as long as its caption takes to read.
  #wait() {
    const pause = SPEEDS[this.speed.value] * (this.film.marks.some(([frame]) => frame === this.frame) ? AT_A_MARK : 1);
    this.timer = setTimeout(() => {
      this.go(this.frame + 1);
      if (this.timer) this.#wait();
    }, pause);
  }

  pause() {
    if (!this.timer) return;
    clearTimeout(this.timer);
    this.timer = null;
    this.said.setAttribute("aria-live", "polite");
    this.#showPlaying(false);
  }

  toggle() {
    if (this.timer) this.pause();
    else this.play();
  }

  #showPlaying(playing) {
    const button = this.buttons.play;
    button.setAttribute("aria-label", playing ? "Pause" : "Play");
    button.querySelector("path").setAttribute("d", playing ? PATHS.pause : PATHS.play);
  }

  #build(document) {
    const button = (name, label, act) => {
      const made = element("button", { type: "button", "aria-label": label, title: label });
      made.innerHTML = `<svg viewBox="0 0 24 24" aria-hidden="true"><path d="${PATHS[name]}"/></svg>`;
      made.addEventListener("click", act);
      return made;
    };
    const still = (act) => () => {
      this.pause();
      act();
    };
    this.buttons = {
      first: button("first", "To the beginning", still(() => this.go(0))),
      stepBack: button("stepBack", "One step of the engine back", still(() => this.goStep(-1))),
      back: button("back", "One event back", still(() => this.go(this.frame - 1))),
      play: button("play", "Play", () => this.toggle()),
      next: button("next", "One event on", still(() => this.go(this.frame + 1))),
      stepNext: button("stepNext", "One step of the engine on", still(() => this.goStep(1))),
    };
    this.slider = element("input", { type: "range", min: 0, max: this.film.length - 1, value: 0, "aria-label": "Moment" });
    this.slider.addEventListener("input", still(() => this.go(Number(this.slider.value))));
    const options = Object.keys(SPEEDS).map((name) => element("option", { value: name, selected: name === "normal" }, name));
    this.speed = element("select", { "aria-label": "Speed" }, ...options);
    this.speed.addEventListener("change", () => {
      if (this.timer) {
        this.pause();
        this.play();
      }
    });
    this.said = element("p", { class: "tp-said", "aria-live": "polite" });
    this.markers = this.film.marks.map(([frame, caption], number) => {
      const marker = element("button", { type: "button", "aria-label": `Moment ${number + 1}: ${caption}`, title: caption }, String(number + 1));
      marker.addEventListener("click", still(() => this.go(frame)));
      return marker;
    });
    const moments = element("div", { class: "tp-marks", role: "group", "aria-label": "Moments that matter" }, ...this.markers);
    this.caption = element("p", { class: "tp-caption", "aria-live": "polite" });
    const marks = this.markers.length ? [moments, this.caption] : [];
    this.count = element("span", { class: "tp-count tp-soft" });
    this.stage = element("div", { class: "tp-stage", role: "img", "aria-label": "The memory at this moment, told in words below" });
    this.moment = element("ul", { class: "tp-moment" });
    const title = document.title ? element("p", { class: "tp-heading" }, element("strong", {}, document.title)) : null;
    const about = document.about ? element("p", { class: "tp-about" }, document.about) : null;
    const face = element(
      "div",
      { class: "tp-player", role: "group", tabindex: 0, "aria-label": `Player: ${document.title ?? "a trace"}` },
      title,
      about,
      element("div", { class: "tp-controls" }, ...Object.values(this.buttons), this.speed, this.count),
      this.slider,
      ...marks,
      this.said,
      element("div", { class: "tp-scroll" }, this.stage),
      element("details", {}, element("summary", {}, "This moment in words"), this.moment),
    );
    face.addEventListener("keydown", (event) => this.#key(event));
    this.replaceChildren(face);
  }

  #key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const own = event.target.tagName; // a slider and a list have keys of their own; a button its space bar
    if (own === "SELECT" || own === "SUMMARY" || (own === "INPUT" && event.key !== " ")) return;
    if (own === "BUTTON" && event.key === " ") return;
    const acts = {
      ArrowRight: () => this.go(this.frame + 1),
      ArrowLeft: () => this.go(this.frame - 1),
      PageDown: () => this.goStep(1),
      PageUp: () => this.goStep(-1),
      Home: () => this.go(0),
      End: () => this.go(this.film.length - 1),
    };
    if (event.key === " ") this.toggle();
    else if (event.key in acts) {
      this.pause();
      acts[event.key]();
    } else return;
    event.preventDefault();
  }
}

customElements.define("trace-player", TracePlayer);
