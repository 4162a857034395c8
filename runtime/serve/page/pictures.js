// Pictures of the question that is being written.

import { Chip } from "./chip.js";
import { about, byId, count } from "./dom.js";

const OTHER_TYPES = /\.(heic|heif|tiff?)$/i; // systems do not always name their type

export class Pictures {
  least = 1; // patches that the model wants of every picture
  find = null; // called with a picture in which something is to be found; null where the server finds nothing
  #chips = [];
  #removed;

  /** `removed` is called with a picture that was taken away. */
  constructor(removed) {
    this.#removed = removed;
  }

  get all() {
    return this.#chips.map((chip) => chip.picture);
  }

  /** Add files; the reasons why some were not. */
  async add(files, most) {
    const refused = [];
    for (const file of files) {
      if (!file.type.startsWith("image/") && !OTHER_TYPES.test(file.name)) refused.push(`${file.name} is no picture.`);
      else if (this.#chips.length >= most) {
        refused.push(`${file.name} was left out: this conversation has room for ${count(most, "more picture")}.`);
      } else {
        const picture = { name: file.name || "picture", url: await dataUrl(file), patches: null };
        const chip = this.#chip(picture);
        this.#chips.push(chip);
        this.#show();
        await chip.price();
      }
    }
    return refused;
  }

  /** Put pictures back that could not be sent. */
  restore(pictures) {
    const chips = pictures.map((picture) => this.#chip(picture));
    this.#chips.unshift(...chips);
    this.#show();
    return Promise.all(chips.map((chip) => chip.price()));
  }

  /** Take those away that are sent. */
  take(pictures) {
    this.#chips = this.#chips.filter((chip) => !pictures.includes(chip.picture));
    this.#show();
  }

  /** Show this one alone, the others are not sent now; null shows all. */
  aim(picture) {
    for (const chip of this.#chips) chip.element.hidden = picture !== null && chip.picture !== picture;
    byId("cost").hidden = picture !== null;
  }

  #chip(picture) {
    const find = this.find && (() => this.find(picture));
    const removed = () => {
      this.take([picture]);
      this.#removed(picture);
    };
    return new Chip(picture, this.least, { changed: () => this.#sum(), removed, find });
  }

  #show() {
    byId("pictures").replaceChildren(...this.#chips.map((chip) => chip.element));
    this.#sum();
  }

  #sum() {
    const tokens = this.#chips.reduce((sum, chip) => sum + (chip.cost?.tokens ?? 0), 0);
    const times = this.#chips.map((chip) => chip.seconds);
    const known = times.length > 1 && this.#chips.every((chip) => chip.cost);
    const time = times.includes(null) ? "" : `, ${about(times.reduce((sum, one) => sum + one, 0))}`;
    byId("cost").textContent = known ? `Together: ${count(tokens, "token")}${time} until the answer begins` : "";
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}
