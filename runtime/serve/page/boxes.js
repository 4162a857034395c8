// A box in an answer, "[x1, y1, x2, y2]" in shares of the sides, over the picture that was asked about.

import { node } from "./dom.js";

const SHARE = "(\\d*\\.?\\d+)";
const BOX = new RegExp(`\\[\\s*${SHARE}\\s*,\\s*${SHARE}\\s*,\\s*${SHARE}\\s*,\\s*${SHARE}\\s*\\]`, "g");
const SVG = "http://www.w3.org/2000/svg";

/** All boxes of a text whose corners lie in the picture; one that is turned round is turned back. */
export function boxesIn(text) {
  return [...text.matchAll(BOX)]
    .map((found) => found.slice(1).map(Number))
    .filter((box) => box.every((share) => share >= 0 && share <= 1))
    .map(([x1, y1, x2, y2]) => [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)]);
}

/** The picture with the boxes over it. */
export function drawn(picture, boxes) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 1 1");
  svg.setAttribute("preserveAspectRatio", "none");
  for (const [x1, y1, x2, y2] of boxes) {
    const box = document.createElementNS(SVG, "rect");
    for (const [name, value] of Object.entries({ x: x1, y: y1, width: x2 - x1, height: y2 - y1 })) {
      box.setAttribute(name, value);
    }
    svg.append(box);
  }
  const image = node("img", { src: picture.url, alt: `${picture.name} with what was found in it` });
  return node("figure", { className: "found" }, image, svg);
}
