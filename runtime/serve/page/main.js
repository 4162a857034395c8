// The page: what is typed, dropped and clicked.

import { model } from "./api.js";
import { asking, receive, thinking } from "./chat.js";
import { byId, node } from "./dom.js";
import { Finder, findTurn, pictureOf } from "./find.js";
import { askKey } from "./key.js";
import { Pictures } from "./pictures.js";
import { saveJson, saveMarkdown } from "./save.js";
import * as store from "./store.js";
import { AnswerView, userTurn } from "./view.js";

const BUDGETS = [64, 128, 256, 512, 1024, 2048, 4096, 8192, null]; // tokens

const question = byId("question");
const log = byId("log");
const finder = new Finder((picture) => pictures.aim(picture));
const pictures = new Pictures((picture) => {
  if (finder.target?.picture === picture) finder.end();
  question.focus();
});
let served = null;
let conversation = store.fresh();
let running = null; // AbortController of the answer that comes in

const say = (text) => { byId("status").textContent = text; };

// the conversation

function show() {
  const shown = conversation.turns.map((turn, number) => {
    if (turn.role === "user") return shownQuestion(turn, number);
    const view = new AnswerView(turn, pictureOf(conversation.turns.slice(0, number)));
    view.show();
    return view.element;
  });
  byId("turns").replaceChildren(...shown);
  byId("welcome").hidden = conversation.turns.length > 0;
  log.scrollTop = log.scrollHeight;
}

function shownQuestion(turn, number) {
  const find = (place) => finder.begin({ picture: turn.pictures[place], at: [number, place] });
  return userTurn(turn, served?.grounding_prompt ? find : null);
}

/** Keep the end in view, unless the reader has scrolled away from it. */
function following(change) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

async function send() {
  const here = conversation; // another may be opened before the answer ends
  const text = question.value.trim();
  const target = finder.target;
  const attached = pictures.all;
  if (running || (!text && !attached.length && !target)) return;
  if (!text) {
    tell(target ? "Type what is to be found first." : "Type a question about the picture first.");
    return;
  }
  const asked = target
    ? findTurn(here.turns, text, target, served.grounding_prompt)
    : { role: "user", text, pictures: attached };
  const turn = { role: "assistant", text: "", thought: "", thoughtSeconds: 0, finish: null };
  const body = {
    model: served?.id,
    ...asking([...here.turns, asked]),
    ...thinking(byId("thinking").value, BUDGETS[byId("budget").value]),
  };
  here.turns.push(asked, turn);
  here.title ||= text.slice(0, 80);
  const view = new AnswerView(turn, pictureOf(here.turns));
  byId("welcome").hidden = true;
  byId("turns").append(shownQuestion(asked, here.turns.length - 2), view.element);
  log.scrollTop = log.scrollHeight;
  question.value = "";
  pictures.take(asked.pictures);
  finder.end();
  setRunning(new AbortController());
  tell("");
  say("The answer is being written.");
  view.show(true);
  const clock = setInterval(() => view.showSoon(() => {}), 500); // a thought's time goes on between tokens
  await receive(turn, body, running.signal, () => view.showSoon(() => following(() => {})));
  clearInterval(clock);
  setRunning(null);
  if (turn.text || turn.thought) {
    following(() => view.show());
    say(turn.error ?? `Answer: ${turn.text.slice(0, 500)}`);
    await kept(store.keep(here));
  } else if (here === conversation) {
    await takeBack(asked, turn);
  }
  await list();
}

/** A question without an answer goes back to where it was written. */
async function takeBack(asked, turn) {
  const picture = pictureOf(conversation.turns);
  conversation.turns.splice(-2);
  if (!conversation.turns.length) conversation.title = "";
  show();
  question.value = asked.text;
  await pictures.restore(asked.pictures);
  if (asked.find) finder.begin({ picture, at: asked.pictures.length ? null : asked.find });
  if (turn.status === 401) await connect(true);
  else if (turn.error) tell(`The question was not answered: ${turn.error}`);
  else say("Stopped.");
  question.focus();
}

function tell(text) {
  byId("wrong")?.remove();
  if (text) byId("composer").prepend(node("p", { id: "wrong", className: "wrong", role: "alert" }, text));
}

function setRunning(controller) {
  running = controller;
  byId("stop").hidden = !controller;
  byId("send").hidden = Boolean(controller);
}

// history

/** A browser that keeps nothing (private windows) costs the history, not the conversation. */
async function kept(work) {
  try {
    return await work;
  } catch {
    tell("This browser does not keep the conversation: save it before you close the tab.");
    return undefined;
  }
}

async function list() {
  const found = (await kept(store.all())) ?? [];
  byId("list").replaceChildren(...found.map((entry) => {
    const open = node("button", { type: "button", className: "title", title: entry.title }, entry.title);
    open.addEventListener("click", () => change(entry));
    const label = `Delete ${entry.title}`;
    const remove = node("button", { type: "button", className: "delete", "aria-label": label }, "✕");
    remove.addEventListener("click", async () => {
      if (!confirm(`Delete the conversation "${entry.title}"?`)) return;
      await kept(store.remove(entry.id));
      if (entry.id === conversation.id) change(store.fresh());
      else await list();
    });
    return node("li", { className: entry.id === conversation.id ? "current" : "" }, open, remove);
  }));
  return found;
}

function change(entry) {
  if (running) running.abort();
  conversation = entry;
  finder.end();
  document.body.classList.remove("listing");
  byId("open-history").setAttribute("aria-expanded", "false");
  tell("");
  show();
  question.focus();
  return list();
}

async function onOtherTab() {
  const found = await list();
  const newer = found.find((entry) => entry.id === conversation.id);
  if (!running && newer && newer.revision > conversation.revision) {
    conversation = newer;
    show();
  }
}

// the server

/** Learn what it serves. A key is asked for until it is right; `again` where one was wrong. */
async function connect(again = false) {
  try {
    served = await model();
    byId("model").textContent = served.id;
    byId("add").hidden = served.max_images === 0;
    pictures.least = served.min_patches ?? 1;
    pictures.find = served.grounding_prompt && ((picture) => finder.begin({ picture, at: null }));
    if (!running) show(); // with what this server can do; an answer that comes in would be drawn no further
    tell("");
  } catch (error) {
    if (error.status !== 401) {
      tell(error.message);
      return;
    }
    await askKey(again);
    await connect(true);
  }
}

// what is typed, dropped and clicked

async function addFiles(files) {
  const before = conversation.turns.reduce((sum, turn) => sum + (turn.pictures?.length ?? 0), 0);
  const most = Math.max(0, (served?.max_images ?? 8) - before);
  tell((await pictures.add(files, most)).join(" "));
  question.focus();
}

function showBudget() {
  const tokens = BUDGETS[byId("budget").value];
  byId("budget-told").textContent = tokens === null ? "no limit" : `${tokens} tokens`;
  byId("budget").setAttribute("aria-valuetext", byId("budget-told").textContent);
  byId("budget").disabled = byId("thinking").value === "nothink";
}

function switchTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try {
    localStorage.setItem("phisight-theme", root.dataset.theme);
  } catch { /* for this visit then */ }
}

function listen(id, event, act) {
  byId(id).addEventListener(event, act);
}

listen("composer", "submit", (event) => { event.preventDefault(); send(); });
listen("stop", "click", () => running?.abort());
listen("add", "click", () => byId("files").click());
listen("files", "change", (event) => { addFiles([...event.target.files]); event.target.value = ""; });
listen("thinking", "change", showBudget);
listen("budget", "input", showBudget);
listen("finding-end", "click", () => { finder.end(); question.focus(); });
listen("theme", "click", switchTheme);
listen("new", "click", () => change(store.fresh()));
listen("save", "click", (event) => { if (event.target.tagName === "BUTTON") byId("save").open = false; });
listen("export-json", "click", () => saveJson([conversation]));
listen("export-markdown", "click", () => saveMarkdown(conversation));
listen("export-all", "click", async () => saveJson((await kept(store.all())) ?? []));
listen("delete-all", "click", async () => {
  if (!confirm("Delete all conversations in this browser?")) return;
  await kept(store.removeAll());
  change(store.fresh());
});
listen("open-history", "click", () => {
  document.body.classList.add("listing");
  byId("open-history").setAttribute("aria-expanded", "true");
  byId("new").focus();
});
listen("close-history", "click", () => {
  document.body.classList.remove("listing");
  byId("open-history").setAttribute("aria-expanded", "false");
  byId("open-history").focus();
});
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) {
    event.preventDefault();
    addFiles(files);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else finder.end();
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("composer").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("composer").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("composer").classList.remove("over");
  if (event.dataTransfer.files.length) addFiles([...event.dataTransfer.files]);
});

store.onOtherTab(onOtherTab);
showBudget();
list();
connect();
question.focus();
