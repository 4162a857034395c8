// Turns as they are shown: the question with its pictures, the answer with thought, boxes and times.

import { boxesIn, drawn } from "./boxes.js";
import { count, node, seconds } from "./dom.js";
import { markdown } from "./markdown.js";

const ENDS = {
  length: "The answer ends here because its length limit was reached.",
  cancelled: "Stopped.",
};

/** `find`, where the server can, is called with the place of a picture in which something is to be found. */
export function userTurn(turn, find) {
  const images = turn.pictures.map((picture, place) => {
    const image = node("img", { src: picture.url, alt: picture.name });
    image.addEventListener("error", () => image.classList.add("broken"));
    if (!find) return image;
    const label = `Find something in ${picture.name}`;
    const button = node("button", { type: "button", className: "plain", "aria-label": label }, "Find something in it");
    button.addEventListener("click", () => find(place));
    return node("div", {}, image, button);
  });
  const shown = images.length ? [node("div", { className: "shown" }, ...images)] : [];
  const said = node("div", { className: "said" }, turn.find ? `Find: ${turn.text}` : turn.text);
  return node("article", { className: "turn user", "aria-label": "You asked" }, ...shown, said);
}

/** An answer that may still grow: `show` draws what it holds now. */
export class AnswerView {
  #turn;
  #picture;
  #thought = node("p");
  #summary = node("summary");
  #folded = node("details", { className: "thought", hidden: true }, this.#summary, this.#thought);
  #answer = node("div", { className: "answer" });
  #behind = node("div");
  #waiting = node("p", { className: "soft waiting", hidden: true }, "Reading the question");
  #next = 0;
  #timer = null;

  /** `picture` is what boxes are drawn over, null for none. */
  constructor(turn, picture) {
    this.#turn = turn;
    this.#picture = picture;
    const properties = { className: "turn assistant", "aria-label": "Answer" };
    this.element = node("article", properties, this.#waiting, this.#folded, this.#answer, this.#behind);
  }

  /** Draw soon; the longer drawing takes, the rarer it is done. */
  showSoon(then) {
    this.#timer ??= setTimeout(() => {
      this.show(true);
      then();
    }, Math.max(0, this.#next - performance.now()));
  }

  show(growing = false) {
    clearTimeout(this.#timer);
    this.#timer = null;
    const started = performance.now();
    const turn = this.#turn;
    this.#waiting.hidden = !growing || Boolean(turn.thought || turn.text);
    this.#folded.hidden = !turn.thought;
    if (turn.thought && this.#thought.textContent !== turn.thought) this.#thought.textContent = turn.thought;
    const thinking = growing && !turn.text;
    this.#summary.textContent = `${thinking ? "Thinking," : "Thought for"} ${seconds(turn.thoughtSeconds)}`;
    this.#answer.replaceChildren(...markdown(turn.text));
    if (!growing) this.#behind.replaceChildren(...behind(turn, this.#picture));
    const ended = performance.now();
    this.#next = ended + Math.max(40, 8 * (ended - started));
  }
}

function behind(turn, picture) {
  const nodes = [];
  const found = turn.grounding;
  const boxes = found ? [found.box] : boxesIn(turn.text);
  if (picture && boxes.length) nodes.push(drawn(picture, boxes, found));
  if (found) nodes.push(place(found));
  const notes = [ENDS[turn.finish], ...(turn.notes ?? [])].filter(Boolean);
  nodes.push(...notes.map((told) => node("p", { className: "note" }, told)));
  if (turn.stats) nodes.push(stages(turn.stats));
  if (turn.error) nodes.push(node("p", { className: "wrong", role: "alert" }, turn.error));
  return nodes;
}

/** In pixels of the picture as it was given. */
function place({ point, pixels, width, height }) {
  const [left, top, right, bottom] = pixels;
  const box = `The box is ${left}, ${top} to ${right}, ${bottom} of ${width} × ${height} pixels.`;
  return node("p", { className: "place" }, node("strong", {}, `Click at ${point.join(", ")}.`), ` ${box}`);
}

const rounded = (value) => (value < 100 ? value.toPrecision(2) : Math.round(value));

function stages(stats) {
  const rate = (tokens, time) => (tokens > 0 && time > 0 ? `, ${rounded(tokens / time)} a second` : "");
  const reused = stats.reused_positions ? `, ${stats.reused_positions} of them remembered from before` : "";
  const cached = stats.cached_images ? `, ${stats.cached_images} of them seen before` : "";
  const prompt = stats.text_tokens + stats.image_tokens;
  const thought = stats.thought_tokens ? `, ${stats.thought_tokens} of them thought` : "";
  const speed = rate(stats.decode_steps, stats.decode_seconds);
  const rows = [
    ["Question read", stats.prefill_seconds, `${count(prompt, "token")}${reused}`],
    ["Answer written", stats.decode_seconds, `${count(stats.generated_tokens, "token")}${thought}${speed}`],
  ];
  if (stats.images) {
    rows.unshift(
      ["Pictures prepared", stats.preprocess_seconds, count(stats.images, "picture")],
      ["Pictures looked at", stats.encode_seconds, `${count(stats.image_tokens, "token")}${cached}`],
    );
  }
  const total = rows.reduce((sum, [, time]) => sum + time, 0);
  const body = rows.map(([stage, time, told]) => {
    return node("tr", {}, ...[stage, seconds(time), told].map((text) => node("td", {}, text)));
  });
  return node("details", { className: "stages" },
    node("summary", {}, `${seconds(total)}, ${count(stats.generated_tokens, "token")}`),
    node("div", { className: "table" }, node("table", {}, node("tbody", {}, ...body))));
}
