// A small part of Markdown as DOM nodes: paragraphs, headings, lists, quotes, tables, code, bold, italic.
// Links and pictures stay text: an answer can make the browser ask for nothing.

import { node } from "./dom.js";

const INLINE = /(`+)(.+?)\1|\*\*(?=\S)(.+?)\*\*|(?<![\w*])\*(?=[^\s*])([^*]+?)\*(?!\w)/s;
const ITEM = /^\s*([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** Nodes of a text, bold and code inside it. */
function inline(text) {
  const nodes = [];
  let rest = text;
  for (let found = INLINE.exec(rest); found; found = INLINE.exec(rest)) {
    nodes.push(rest.slice(0, found.index));
    if (found[1]) nodes.push(node("code", {}, found[2]));
    else if (found[3] !== undefined) nodes.push(node("strong", {}, ...inline(found[3])));
    else nodes.push(node("em", {}, ...inline(found[4])));
    rest = rest.slice(found.index + found[0].length);
  }
  return [...nodes, rest].filter((piece) => piece !== "");
}

/** Lines of one block, from `start`, while a test holds; where they end. */
function run(lines, start, test) {
  let end = start;
  while (end < lines.length && test(lines[end])) end += 1;
  return [lines.slice(start, end), end];
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(lines) {
  const row = (line, tag) => node("tr", {}, ...cells(line).map((cell) => node(tag, {}, ...inline(cell))));
  const body = node("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  return node("div", { className: "table" }, node("table", {}, node("thead", {}, row(lines[0], "th")), body));
}

function list(lines) {
  const ordered = /^\s*\d/.test(lines[0]);
  const items = [];
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found) items.push([found[2]]);
    else items.at(-1).push(line.trim());
  }
  const made = node(ordered ? "ol" : "ul", {}, ...items.map((item) => node("li", {}, ...inline(item.join(" ")))));
  if (ordered) made.start = parseInt(lines[0], 10);
  return made;
}

const beginsBlock = (line) => /^\s*```/.test(line) || HEADING.test(line) || ITEM.test(line) || /^\s*>/.test(line);

/** The blocks of a text. */
export function markdown(text) {
  const lines = text.split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    let taken;
    if (!line.trim()) {
      at += 1;
    } else if (/^\s*```/.test(line)) {
      [taken, at] = run(lines, at + 1, (next) => !/^\s*```\s*$/.test(next));
      blocks.push(node("pre", {}, node("code", {}, taken.join("\n"))));
      at += 1;
    } else if (HEADING.test(line)) {
      const [, level, title] = HEADING.exec(line);
      blocks.push(node(level.length < 3 ? "h3" : "h4", {}, ...inline(title)));
      at += 1;
    } else if (line.includes("|") && RULE.test(lines[at + 1] ?? "") && lines[at + 1].includes("-")) {
      [taken, at] = run(lines, at, (next) => next.includes("|"));
      blocks.push(table(taken));
    } else if (ITEM.test(line)) {
      const ordered = /^\s*\d/.test(line);
      [taken, at] = run(lines, at, (next) => (ITEM.test(next) ? /^\s*\d/.test(next) === ordered : /^\s+\S/.test(next)));
      blocks.push(list(taken));
    } else if (/^\s*>/.test(line)) {
      [taken, at] = run(lines, at, (next) => /^\s*>/.test(next));
      blocks.push(node("blockquote", {}, ...markdown(taken.map((next) => next.replace(/^\s*> ?/, "")).join("\n"))));
    } else {
      const start = at;
      [taken, at] = run(lines, at, (next) => next.trim() && (next === line || !beginsBlock(next)));
      if (at === start) at += 1;
      blocks.push(node("p", {}, ...inline(taken.join("\n"))));
    }
  }
  return blocks;
}
