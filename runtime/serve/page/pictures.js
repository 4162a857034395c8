// Pictures of the question that is being written: read, shown, and priced before they are sent.

import { imageCost } from "./api.js";
import { about, byId, count, node } from "./dom.js";

const OTHER_TYPES = /\.(heic|heif|tiff?)$/i; // systems do not always name their type

export class Pictures {
  #pending = [];

  get all() {
    return this.#pending.map(({ name, url }) => ({ name, url }));
  }

  /** Add files; the reasons why some were not. */
  async add(files, most) {
    const refused = [];
    for (const file of files) {
      if (!file.type.startsWith("image/") && !OTHER_TYPES.test(file.name)) refused.push(`${file.name} is no picture.`);
      else if (this.#pending.length >= most) {
        refused.push(`${file.name} was left out: this conversation has room for ${count(most, "more picture")}.`);
      } else {
        const picture = { name: file.name || "picture", url: await dataUrl(file), cost: null, size: null };
        this.#pending.push(picture);
        this.#show();
        await this.#price(picture);
      }
    }
    return refused;
  }

  /** Put pictures back that could not be sent. */
  restore(pictures) {
    this.#pending = pictures.map((picture) => ({ ...picture, cost: null, size: null }));
    this.#show();
    return Promise.all(this.#pending.map((picture) => this.#price(picture)));
  }

  clear() {
    this.#pending = [];
    this.#show();
  }

  async #price(picture) {
    picture.size = await sizeOf(picture.url);
    if (picture.size) picture.cost = await imageCost(...picture.size).catch(() => null);
    this.#show();
  }

  #remove(picture) {
    this.#pending = this.#pending.filter((other) => other !== picture);
    this.#show();
    byId("question").focus();
  }

  #show() {
    byId("pictures").replaceChildren(...this.#pending.map((picture) => this.#chip(picture)));
    const costs = this.#pending.map((picture) => picture.cost);
    const tokens = costs.reduce((sum, cost) => sum + (cost?.tokens ?? 0), 0);
    const times = costs.map(secondsOf);
    const known = costs.length > 1 && costs.every(Boolean);
    const time = times.includes(null) ? "" : `, ${about(times.reduce((sum, one) => sum + one, 0))}`;
    byId("cost").textContent = known ? `Together: ${count(tokens, "token")}${time} until the answer begins` : "";
  }

  #chip(picture) {
    const image = node("img", { src: picture.url, alt: "" });
    image.addEventListener("error", () => image.classList.add("broken"));
    const label = `Remove ${picture.name}`;
    const remove = node("button", { type: "button", className: "plain", "aria-label": label }, "✕");
    remove.addEventListener("click", () => this.#remove(picture));
    const name = node("strong", { title: picture.name }, picture.name);
    const cost = node("span", { className: "soft" }, costText(picture));
    return node("li", { className: "chip" }, image, node("div", {}, name, cost), remove);
  }
}

/** Seconds until a picture's tokens have run; null while this server has not shown any. */
function secondsOf(cost) {
  const known = cost && cost.encode_seconds !== null && cost.prefill_seconds !== null;
  return known ? cost.encode_seconds + cost.prefill_seconds : null;
}

function costText({ size, cost }) {
  if (!cost) return size === null ? "reading the picture" : size ? `${size[0]} × ${size[1]}` : "cannot be shown here";
  const time = secondsOf(cost);
  return `${count(cost.tokens, "token")}, ${time === null ? "time known after a first answer" : about(time)}`;
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
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
