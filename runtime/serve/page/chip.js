// One picture of the question that is being written: what it costs, and how closely the server is to look at it.

import { imageCost } from "./api.js";
import { about, count, node } from "./dom.js";

const STEPS = 16; // of the slider, from the fewest patches to as many as the picture has

export class Chip {
  element = node("li", { className: "chip" });
  cost = null;
  #size = null; // [width, height]; false for what this browser cannot open
  #full = null; // patches without a limit
  #least;
  #changed;
  #asked = 0;
  #cost = node("span", { className: "soft" });
  #slider = node("input", { type: "range", min: 0, max: STEPS, step: 1, value: STEPS });
  #detail = node("label", { className: "choice detail", hidden: true }, "Detail", this.#slider);

  /** `picture` has name, url and patches (null: no limit); `least` is the fewest patches that the model was trained on. */
  constructor(picture, least, { changed, removed, find }) {
    this.picture = picture;
    this.#least = least;
    this.#changed = changed;
    const image = node("img", { src: picture.url, alt: "" });
    image.addEventListener("error", () => image.classList.add("broken"));
    const name = node("strong", { title: picture.name }, picture.name);
    const remove = button(`Remove ${picture.name}`, "✕", removed);
    this.#slider.setAttribute("aria-label", `Detail of ${picture.name}`);
    this.#slider.addEventListener("input", () => this.#slide());
    const found = find ? [button(`Find something in ${picture.name}`, "Find", find)] : [];
    this.element.append(image, node("div", {}, name, this.#cost, this.#detail), ...found, remove);
    this.#show();
  }

  /** Learn its size, then its cost. */
  async price() {
    this.#size = await sizeOf(this.picture.url);
    const full = this.#size && (await imageCost(...this.#size, null).catch(() => null));
    if (full) {
      this.#full = full.tokens;
      this.#detail.hidden = full.tokens <= this.#least;
      this.#slider.value = this.#stepOf(this.picture.patches);
    }
    await this.#ask();
  }

  /** Seconds until its tokens have run; null while this server has not shown any. */
  get seconds() {
    const known = this.cost && this.cost.encode_seconds !== null && this.cost.prefill_seconds !== null;
    return known ? this.cost.encode_seconds + this.cost.prefill_seconds : null;
  }

  async #slide() {
    const share = Number(this.#slider.value) / STEPS;
    this.picture.patches = share === 1 ? null : Math.round(this.#least + (this.#full - this.#least) * share);
    await this.#ask();
  }

  #stepOf(patches) {
    if (!patches || this.#full <= this.#least) return STEPS;
    return Math.round((STEPS * (patches - this.#least)) / (this.#full - this.#least));
  }

  async #ask() {
    this.#asked += 1;
    const asked = this.#asked; // the slider may have moved on before the cost is known
    const cost = this.#size && (await imageCost(...this.#size, this.picture.patches).catch(() => null));
    if (asked !== this.#asked) return;
    this.cost = cost || null;
    this.#show();
    this.#changed();
  }

  #show() {
    this.#cost.textContent = this.#told();
    this.#slider.setAttribute("aria-valuetext", this.#cost.textContent);
  }

  #told() {
    const size = this.#size;
    if (size === null) return "reading the picture";
    if (!this.cost) return size ? `${size[0]} × ${size[1]}` : "cannot be shown here";
    const time = this.seconds === null ? "time known after a first answer" : about(this.seconds);
    return `${count(this.cost.tokens, "token")}, ${time}`;
  }
}

function button(label, text, act) {
  const made = node("button", { type: "button", className: "plain", title: label, "aria-label": label }, text);
  made.addEventListener("click", act);
  return made;
}

/** Width and height as shown, EXIF applied; false for what this browser cannot open. */
async function sizeOf(url) {
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
    return [image.naturalWidth, image.naturalHeight];
  } catch {
    return false;
  }
}
