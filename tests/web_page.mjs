// Open the page in Chromium, give it a file or the microphone, and print its text and status as JSON.
//
//     node web_page.mjs PLAYWRIGHT CHROMIUM URL FILE|microphone|plain|none [PICTURE.png]
//
// "microphone" clicks twice, as an impatient user does; "plain" pretends to have a page without HTTPS. "live" is the number of
// microphones that are still open, "slices" how many arrays the page has sliced, and "copied" what it says after copying.

import {writeFileSync} from 'node:fs';

const PATIENCE = 240000; // milliseconds, enough on a busy machine
const [playwright, executablePath, url, heard, picture] = process.argv.slice(2);
const {chromium} = await import(playwright);
const isPlain = heard === 'plain';
const args = ['--disable-background-networking', '--disable-component-update', '--disable-gpu', '--no-first-run'];
if (heard === 'microphone') args.push('--use-fake-ui-for-media-stream', '--use-fake-device-for-media-stream');
const browser = await chromium.launch({executablePath, args, chromiumSandbox: false});
try {
  const page = await browser.newPage({viewport: {width: 960, height: 760}, deviceScaleFactor: 2});
  page.setDefaultTimeout(PATIENCE);
  const errors = [];
  page.on('pageerror', (error) => errors.push(error.message));
  await page.addInitScript((isPlain) => {
    window.streams = [];
    const {mediaDevices} = navigator;
    const open = mediaDevices.getUserMedia.bind(mediaDevices);
    mediaDevices.getUserMedia = async (wanted) => {
      const stream = await open(wanted);
      window.streams.push(stream);
      return stream;
    };
    if (isPlain) for (const name of ['mediaDevices', 'clipboard']) Object.defineProperty(navigator, name, {value: undefined});
    const {slice} = Array.prototype;
    window.slices = 0;
    Array.prototype.slice = function (...range) {
      window.slices += 1;
      return slice.apply(this, range);
    };
  }, isPlain);
  const settled = () => page.waitForFunction(() => !document.body.hasAttribute('data-busy'), undefined, {timeout: PATIENCE});
  await page.goto(url);
  if (heard !== 'none') await settled();
  if (heard === 'microphone') {
    await page.getByRole('button', {name: 'Microphone'}).evaluate((button) => {
      button.click();
      button.click();
    });
    await page.waitForTimeout(3000);
    await page.getByRole('button', {name: 'Stop'}).click();
    await settled();
  } else if (isPlain) {
    await page.getByRole('button', {name: 'Microphone'}).click();
    await page.locator('#status.error').waitFor();
  } else if (heard === 'none') {
    await page.locator('#status.error').waitFor();
  } else {
    await page.getByLabel('Open a file').setInputFiles(heard);
    await page.getByRole('button', {name: 'Copy text', disabled: false}).or(page.locator('#status.error')).waitFor({timeout: PATIENCE});
    await settled();
  }
  const text = await page.locator('#words span').allInnerTexts();
  if (picture) writeFileSync(picture, await page.screenshot());
  const status = await page.getByRole('status').innerText();
  const about = await page.evaluate(async () => {
    const live = window.streams.flatMap((stream) => stream.getTracks()).filter(({readyState}) => readyState === 'live').length;
    const {slices} = window;
    const copy = document.getElementById('copy');
    copy.disabled = false;
    copy.click();
    await new Promise((resolve) => setTimeout(resolve));
    return {live, slices, copied: document.getElementById('status').textContent};
  });
  console.log(JSON.stringify({text: text.join(' '), status, errors, ...about}));
} finally {
  await browser.close();
}
